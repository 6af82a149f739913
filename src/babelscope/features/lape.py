"""LAPE for neurons, from which SAE-LAPE was derived."""

from collections.abc import Iterator

import polars as pl

from babelscope.core.errors import UserError
from babelscope.features import rates
from babelscope.features.rates import Counts


def lape(
    counts: Counts, totals: pl.DataFrame, *, units: int, quantile: float = 0.95, top_rate: float = 0.01
) -> pl.DataFrame:
    """Language-specific neurons by activation probability entropy (Tang et al. 2024, arXiv 2402.16438).

    Neurons with no P(l, u) = c / T above the bar (see `probability_bar`) are dropped; of the rest, the
    round(top_rate * units) of lowest entropy are kept. Language l owns u if P(l, u) > bar; a neuron may belong to
    several languages.

    Parameters
    ----------
    counts: `layer`, `unit`, `language`, `tokens` (and `hookpoint`, which is then part of a unit's name); one row per
        unit and language, rows without a firing may be missing. A lazy frame is read one layer at a time, twice.
    totals: `language`, `tokens`; its order of the languages is the order of the result.
    units: number of units, including those that never fire.
    quantile: the bar is this quantile of all probabilities.
    top_rate: share of the units that are kept.

    Returns
    -------
    `language`, (`hookpoint`,) `layer`, `unit`, `probability` (P(l, u)), `entropy` (nats), `members` (languages
    that own the unit), `rank` (from 1), sorted by language and rank: entropy ascending, ties by (layer, unit).

    Raises
    ------
    UserError: an argument is out of range, a column is missing, a language has no total, a unit has two rows for one
        language, or `counts` holds more than `units` units.
    """
    rates.check_shares(top_rate=top_rate)
    bar = probability_bar(counts, totals, units=units, quantile=quantile)
    totals, key = rates.check_totals(totals), rates.unit_key(counts)
    parts, entropies = [], []
    for rows in _layers(counts, totals, key):
        high = rows.filter(pl.col("probability") > bar)
        parts.append(high)
        entropies.append(rates.entropies(rows.join(high.select(key), on=key, how="semi"), key).drop("peak"))
    above = pl.concat(parts)
    kept = pl.concat(entropies).sort("entropy", *rates.tie_break(key)).head(round(top_rate * units))
    return (
        above.join(kept, on=key)
        .join(totals.select("language").with_row_index("_position"), on="language", how="left")
        .sort("_position", "entropy", *rates.tie_break(key))
        .with_columns(
            members=pl.len().over(key).cast(pl.Int64),
            rank=pl.int_range(1, pl.len() + 1, dtype=pl.Int64).over("_position"),
        )
        .select("language", *key, "probability", "entropy", "members", "rank")
    )


def probability_bar(counts: Counts, totals: pl.DataFrame, *, units: int, quantile: float = 0.95) -> float:
    """The `quantile` of all n = units x languages activation probabilities: the round(quantile * n)-th smallest.

    Units without a row count as 0. `round` is Python's (halves to even), and the rank is at least 1. Parameters and
    errors are those of `lape`.
    """
    rates.check_shares(quantile=quantile)
    rates.require(counts, ["layer", "unit", "language", "tokens"], "counts")
    totals, key = rates.check_totals(totals), rates.unit_key(counts)
    size = units * len(totals)
    nth = max(1, round(quantile * size))
    largest, found, firing = pl.Series(dtype=pl.Float64), 0, 0
    for rows in _layers(counts, totals, key):
        rates.check_once(rows, key)
        found += len(rows)
        firing += rows.select(key).n_unique() if len(rows) else 0
        # The n-th smallest value is the smallest of the `size - nth + 1` largest: no more are kept.
        new = rows["probability"].rename("")
        if len(largest) > size - nth:
            new = new.filter(new > largest.min())
        largest = pl.concat([largest, new]).top_k(size - nth + 1)
    if firing > units:
        raise UserError(f"units: {units} units in all, but the counts hold {firing}")
    return 0.0 if nth <= size - found else float(largest.min())  # type: ignore[arg-type]


def _layers(counts: Counts, totals: pl.DataFrame, key: list[str]) -> Iterator[pl.DataFrame]:
    """The rows with a firing and their `probability`, one layer at a time."""
    for rows in rates.by_layer(counts, [*key, "language", "tokens"]):
        yield rates.probabilities(rows, totals)
