"""How well predicted languages agree with the true ones, and whether two classifiers differ."""

import math

import polars as pl

from babelscope.core.errors import UserError


def accuracy(truth: pl.Series, predicted: pl.Series) -> float:
    """Share of texts whose predicted language is the true one (a null prediction is wrong; nan without texts)."""
    return int(_right(truth, predicted).sum()) / len(truth) if len(truth) else math.nan


def f1(truth: pl.Series, predicted: pl.Series, languages: list[str]) -> dict[str, float]:
    """F1 of each of `languages`: 2 TP / (2 TP + FP + FN), with 0 / 0 = 0 as in scikit-learn."""
    right = _right(truth, predicted)
    scores = {}
    for language in languages:
        both = int((truth == language).sum()) + int((predicted == language).sum())
        scores[language] = 2 * int(right.filter(truth == language).sum()) / both if both else 0.0
    return scores


def confusion(truth: pl.Series, predicted: pl.Series, languages: list[str]) -> pl.DataFrame:
    """Every pair of `languages` with its number of texts: `language` (true), `predicted`, `texts` (0 included)."""
    _check_lengths(truth, predicted)
    names = pl.Series(languages, dtype=pl.String)
    pairs = pl.DataFrame({"language": names}).join(pl.DataFrame({"predicted": names}), how="cross")
    found = pl.DataFrame({"language": truth, "predicted": predicted}).group_by("language", "predicted").len("texts")
    counted = pairs.join(found, on=["language", "predicted"], how="left", maintain_order="left")
    return counted.with_columns(pl.col("texts").fill_null(0).cast(pl.Int64))


def mcnemar(first_right: pl.Series, second_right: pl.Series) -> float:
    """McNemar's exact test (1947): two-sided p-value for a difference between two classifiers on the same texts.

    If they do not differ, the first is right on Binomial(n, 1/2) of the n texts on which only one is right. Both series
    are boolean, one value per text, in the same order.
    """
    _check_lengths(first_right, second_right)
    only_first, only_second = int((first_right & ~second_right).sum()), int((~first_right & second_right).sum())
    discordant = only_first + only_second
    # In integers: scipy.stats, which has this test, takes a second to import.
    tail = ways = 1
    for count in range(min(only_first, only_second)):
        ways = ways * (discordant - count) // (count + 1)
        tail += ways
    return min(1.0, float(2 * tail / 2**discordant))


def figures(predictions: pl.DataFrame, languages: list[str], baseline: str) -> dict[str, float]:
    """The numbers of every classifier, and McNemar's test of each against `baseline`.

    Languages for which a classifier has no rows are left out of its numbers and its comparison.

    Parameters
    ----------
    predictions: `text_id`, `language` (true), `method`, `normalize`, `predicted`.
    baseline: the `method` with which the others are compared, if it has rows.

    Returns
    -------
    `accuracy/<method>/<normalize>`, `macro_f1/<method>/<normalize>`, `f1/<method>/<normalize>/<language>` and
    `mcnemar_p/<method>/<normalize>`.
    """
    numbers: dict[str, float] = {}
    predictions = predictions.with_columns(right=_right(predictions["language"], predictions["predicted"]))
    reference = predictions.filter(method=baseline).select("text_id", reference="right")
    for (method, normalize), rows in predictions.group_by("method", "normalize", maintain_order=True):
        name = f"{method}/{normalize}"
        asked = [language for language in languages if language in set(rows["language"])]
        scores = f1(rows["language"], rows["predicted"], asked)
        numbers[f"accuracy/{name}"] = accuracy(rows["language"], rows["predicted"])
        numbers[f"macro_f1/{name}"] = math.fsum(scores.values()) / len(asked)
        numbers |= {f"f1/{name}/{language}": score for language, score in scores.items()}
        both = rows.join(reference, on="text_id")
        if method != baseline and len(both):
            numbers[f"mcnemar_p/{name}"] = mcnemar(both["right"], both["reference"])
    return numbers


def by_source(predictions: pl.DataFrame, source: pl.DataFrame) -> dict[str, float]:
    """`source/<source>/accuracy/<method>/<normalize>` and `source/<source>/texts` if there are several sources.

    Parameters
    ----------
    predictions: as in `figures`.
    source: `text_id` and `source` (where the text comes from) of every text.
    """
    numbers: dict[str, float] = {}
    if source["source"].n_unique() < 2:
        return numbers
    joined = predictions.join(source, on="text_id", maintain_order="left").sort("source", maintain_order=True)
    for (name, method, normalize), rows in joined.group_by("source", "method", "normalize", maintain_order=True):
        numbers[f"source/{name}/accuracy/{method}/{normalize}"] = accuracy(rows["language"], rows["predicted"])
    counts = joined.group_by("source", maintain_order=True).agg(pl.col("text_id").n_unique())
    return numbers | {f"source/{name}/texts": count for name, count in counts.iter_rows()}


def _right(truth: pl.Series, predicted: pl.Series) -> pl.Series:
    _check_lengths(truth, predicted)
    return (truth == predicted).fill_null(False)


def _check_lengths(first: pl.Series, second: pl.Series) -> None:
    if len(first) != len(second):
        raise UserError(f"{len(first)} values against {len(second)}: both must be for the same texts")
