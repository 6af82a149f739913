"""Accuracies and effects with bootstrap intervals over the same held-out texts."""

from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

REFERENCE = "features"
# Resamples of the languages.
RESAMPLES = 1000


def accuracies(right: Mapping[str, Bools], resamples: int, seed: int) -> pl.DataFrame:
    """The accuracy of every method, and its difference to `REFERENCE`, with 95 % intervals.

    Percentiles over resamples of the texts (Efron 1979), which all methods share, so that a difference is paired.

    Parameters
    ----------
    right: by method, whether each of the same texts was identified, bool `[texts]`.

    Returns
    -------
    `method`, `texts`, `accuracy`, `low`, `high`, `difference`, `difference_low`, `difference_high` (null: `right` lacks
    the reference).
    """
    names, table = list(right), np.array(list(right.values()), dtype=np.float64)
    texts = table.shape[1]
    weight = np.random.default_rng(seed).multinomial(texts, np.full(texts, 1 / texts), size=resamples) / texts
    resampled = table @ weight.T
    low, high = np.quantile(resampled, [0.025, 0.975], axis=1)
    found = pl.DataFrame({"method": names, "texts": texts, "accuracy": table.mean(axis=1), "low": low, "high": high})
    if REFERENCE not in names:
        none = pl.lit(None, pl.Float64)
        return found.with_columns(difference=none, difference_low=none, difference_high=none)
    at = names.index(REFERENCE)
    low, high = np.quantile(resampled - resampled[at], [0.025, 0.975], axis=1)
    difference = table.mean(axis=1) - table[at].mean()
    return found.with_columns(
        difference=pl.Series(difference), difference_low=pl.Series(low), difference_high=pl.Series(high)
    )


def mean(values: Floats) -> dict[str, float]:
    """The mean of the languages' `values` (key: ""), and its 95 % interval over resamples of them ("_low", "_high")."""
    drawn = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(values[drawn].mean(axis=1), [0.025, 0.975])
    return {"": float(values.mean()), "_low": float(low), "_high": float(high)}


def effects(
    changes: Sequence[Floats], tokens: NDArray[np.int64], language: Sequence[str], languages: Sequence[str],
    resamples: int, seed: int,
) -> dict[str, float]:  # fmt: skip
    """The mean change of the NLL of the languages themselves, of the others, and their difference, with 95 % intervals.

    Means over the languages of `sum of changes / sum of tokens`, over resamples of each language's texts and, if there
    are several, of the SAEs.

    Parameters
    ----------
    changes: of each SAE, nats, `[languages, texts]`: row i is without what marks language i; NaN where it was not
        measured, at the same places for all SAEs.
    tokens: target tokens, `[texts]`.
    language: of each text.

    Returns
    -------
    `own`, `others`, `contrast` (own - others), each also with `_low` and `_high`, in nats/token; nothing if no language
    was measured on a text of its own.
    """
    codes = np.array([list(languages).index(name) for name in language])
    random, known = np.random.default_rng(seed), ~np.isnan(changes[0])
    # Resampled once per language: the texts of a language are the same for every row.
    weight = np.zeros((resamples + 1, len(tokens)))
    weight[0] = 1.0  # the sample itself
    for code in np.unique(codes):
        texts = np.flatnonzero(codes == code)
        weight[1:, texts] = random.multinomial(len(texts), np.full(len(texts), 1 / len(texts)), size=resamples)
    number = len(changes)
    share = np.full((resamples + 1, number), 1 / number)  # of each SAE
    if number > 1:
        share[1:] = random.multinomial(number, share[0], size=resamples) / number
    own: list[Floats] = []
    others: list[Floats] = []
    for row in range(len(languages)):
        for code in np.unique(codes):
            texts = np.flatnonzero((codes == code) & known[row])
            if len(texts):
                total = np.maximum(weight[:, texts] @ tokens[texts], 1.0)
                sums = np.stack([weight[:, texts] @ change[row, texts] for change in changes], axis=1)
                (own if code == row else others).append((share * sums).sum(axis=1) / total)
    if not own:
        return {}
    parts = {"own": np.mean(own, axis=0), "others": np.mean(others, axis=0) if others else np.zeros(resamples + 1)}
    parts["contrast"] = parts["own"] - parts["others"]
    result: dict[str, float] = {}
    for name, values in parts.items():
        low, high = np.quantile(values[1:], [0.025, 0.975])
        result |= {name: float(values[0]), f"{name}_low": float(low), f"{name}_high": float(high)}
    return result


def matrix(change: Floats, tokens: NDArray[np.int64], language: Sequence[str], languages: Sequence[str]) -> Floats:
    """The change of the NLL by removed language and language of the texts, nats/token; NaN where it was not measured.

    Parameters as those of `effects`, for one SAE; `[languages, languages]`.
    """
    of = np.array([[name == one for one in language] for name in languages]).T
    known = ~np.isnan(change)
    with np.errstate(invalid="ignore"):
        table: Floats = (np.where(known, change, 0.0) @ of) / ((known * tokens) @ of)
    return table


def correlation(first: Floats, second: Floats) -> float | None:
    """Pearson's correlation over the cells that both hold; None if it is not defined."""
    known = ~np.isnan(first) & ~np.isnan(second)
    both = first[known], second[known]
    if known.sum() < 3 or not all(part.std() > 0 for part in both):
        return None
    return float(np.corrcoef(*both)[0, 1])
