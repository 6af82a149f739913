"""How well predicted languages agree with the true ones, and whether two classifiers differ."""

import math
from typing import NamedTuple

import polars as pl

from babelscope.core.errors import UserError


class McNemar(NamedTuple):
    """McNemar's exact test of two classifiers on the same texts."""

    only_first: int  # texts that only the first gets right
    only_second: int  # texts that only the second gets right
    p_value: float  # two-sided


def accuracy(truth: pl.Series, predicted: pl.Series) -> float:
    """Share of texts whose predicted language is the true one (a null prediction is wrong; nan without texts)."""
    _same_length(truth, predicted)
    return int(_right(truth, predicted).sum()) / len(truth) if len(truth) else math.nan


def per_language(truth: pl.Series, predicted: pl.Series, languages: list[str]) -> pl.DataFrame:
    """Precision, recall and F1 of each of `languages`.

    F1 = 2 TP / (2 TP + FP + FN). A ratio with denominator 0 is 0, as in scikit-learn.

    Returns
    -------
    `language`, `texts` (that are truly of it), `predicted` (as it), `right`, `precision`, `recall`, `f1`, in the order
    of `languages`.
    """
    _same_length(truth, predicted)
    hits = truth.filter(_right(truth, predicted))
    rows = []
    for language in languages:
        texts, called, right = (int((series == language).sum()) for series in (truth, predicted, hits))
        rows.append((
            language, texts, called, right,
            right / called if called else 0.0,
            right / texts if texts else 0.0,
            2 * right / (texts + called) if texts + called else 0.0,
        ))  # fmt: skip
    names = {"language": pl.String, "texts": pl.Int64, "predicted": pl.Int64, "right": pl.Int64}
    return pl.DataFrame(rows, schema=names | dict.fromkeys(("precision", "recall", "f1"), pl.Float64), orient="row")


def macro_f1(truth: pl.Series, predicted: pl.Series, languages: list[str]) -> float:
    """The unweighted mean of the F1 of `languages`."""
    scores = per_language(truth, predicted, languages)["f1"].to_list()
    return math.fsum(scores) / len(scores) if scores else math.nan


def confusion(truth: pl.Series, predicted: pl.Series, languages: list[str]) -> pl.DataFrame:
    """Every pair of `languages` with its number of texts: `language` (true), `predicted`, `texts` (0 included)."""
    _same_length(truth, predicted)
    names = pl.Series(languages, dtype=pl.String)
    pairs = pl.DataFrame({"language": names}).join(pl.DataFrame({"predicted": names}), how="cross")
    found = pl.DataFrame({"language": truth, "predicted": predicted}).group_by("language", "predicted").len("texts")
    counted = pairs.join(found, on=["language", "predicted"], how="left", maintain_order="left")
    return counted.with_columns(pl.col("texts").fill_null(0).cast(pl.Int64))


def mcnemar(first_right: pl.Series, second_right: pl.Series) -> McNemar:
    """McNemar's exact test (1947): do two classifiers, right or wrong on the same texts, differ?

    Of the n texts on which just one is right, the number that the first gets right is Binomial(n, 1/2) if they do not
    differ; p = min(1, 2 P(X <= min(b, c))), in exact integer arithmetic.

    Parameters
    ----------
    first_right, second_right: boolean, one value per text, in the same order.
    """
    _same_length(first_right, second_right)
    b, c = int((first_right & ~second_right).sum()), int((~first_right & second_right).sum())
    tail = term = 1
    for i in range(min(b, c)):
        term = term * (b + c - i) // (i + 1)
        tail += term
    return McNemar(b, c, 1.0 if b == c else min(1.0, 2 * tail / 2 ** (b + c)))


def figures(predictions: pl.DataFrame, languages: list[str], baseline: str) -> dict[str, float]:
    """The numbers of every classifier, and McNemar's test of each against `baseline`.

    A classifier may have no rows for the texts of some languages (those it does not know): its numbers are about the
    others, and so is its comparison.

    Parameters
    ----------
    predictions: `text_id`, `language` (true), `method`, `normalize`, `predicted`.
    languages: order of the languages.
    baseline: the `method` that the others are compared with; without rows of it there is no comparison.

    Returns
    -------
    `accuracy/<method>/<normalize>`, `macro_f1/<method>/<normalize>`, `f1/<method>/<normalize>/<language>` and
    `mcnemar_p/<method>/<normalize>`.
    """
    numbers: dict[str, float] = {}
    reference = predictions.filter(method=baseline).select("text_id", reference=_hits())
    for (method, normalize), rows in predictions.group_by("method", "normalize", maintain_order=True):
        name = f"{method}/{normalize}"
        asked = [language for language in languages if language in set(rows["language"])]
        scores = per_language(rows["language"], rows["predicted"], asked)
        numbers[f"accuracy/{name}"] = accuracy(rows["language"], rows["predicted"])
        numbers[f"macro_f1/{name}"] = math.fsum(scores["f1"]) / len(asked)
        numbers |= {f"f1/{name}/{language}": f1 for language, f1 in scores.select("language", "f1").iter_rows()}
        both = rows.select("text_id", right=_hits()).join(reference, on="text_id")
        if method != baseline and len(both):
            numbers[f"mcnemar_p/{name}"] = mcnemar(both["right"], both["reference"]).p_value
    return numbers


def _hits() -> pl.Expr:
    return (pl.col("language") == pl.col("predicted")).fill_null(False)


def _right(truth: pl.Series, predicted: pl.Series) -> pl.Series:
    return (truth == predicted).fill_null(False)


def _same_length(first: pl.Series, second: pl.Series) -> None:
    if len(first) != len(second):
        raise UserError(f"{len(first)} values against {len(second)}: both must be about the same texts")
