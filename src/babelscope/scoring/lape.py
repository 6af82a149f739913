"""LAPE for neurons: the baseline that SAE-LAPE was derived from."""

import polars as pl

from babelscope.errors import UserError
from babelscope.scoring import counts as firing
from babelscope.scoring.counts import Counts


def lape(
    counts: Counts, totals: pl.DataFrame, *, units: int, quantile: float = 0.95, top_rate: float = 0.01
) -> pl.DataFrame:
    """Language-specific neurons by activation probability entropy (Tang et al. 2024, arXiv 2402.16438).

    Neurons with no P(l, u) = c / T above the bar (see `probability_bar`) are dropped; of the rest, the
    round(top_rate * units) of lowest entropy are kept; language l owns u where P(l, u) > bar. A neuron may belong to
    several languages.

    Parameters
    ----------
    counts: `layer`, `unit`, `language`, `tokens` (and `hookpoint`, which is then part of a unit's name); one row per
        unit and language, rows without a firing may be missing.
    totals: `language`, `tokens`; its order of the languages is the order of the result.
    units: how many units there are, those that never fire included.
    quantile: which quantile of all probabilities the bar is.
    top_rate: share of the units that are kept.

    Returns
    -------
    `language`, (`hookpoint`,) `layer`, `unit`, `probability` (P(l, u)), `entropy` (nats), `members` (how many
    languages own the unit), `rank` (from 1), sorted by language and rank: entropy ascending, ties by (layer, unit).

    Raises
    ------
    UserError: an argument is out of range, a column is missing, a language has no total, a unit has two rows for one
        language, or `counts` holds more than `units` units.
    """
    if not 0 <= top_rate <= 1:
        raise UserError(f"top_rate: {top_rate} is not between 0 and 1")
    rows, totals, key = _rows(counts, totals)
    bar = _bar(rows, totals, key, units, quantile)
    above = rows.filter(pl.col("probability") > bar)
    entropies = firing.entropies(rows.join(above.select(key), on=key, how="semi"), key).drop("peak")
    kept = entropies.sort("entropy", *firing.tie_break(key)).head(round(top_rate * units))
    return (
        above.join(kept, on=key)
        .join(totals.select("language").with_row_index("_place"), on="language", how="left")
        .sort("_place", "entropy", *firing.tie_break(key))
        .with_columns(
            members=pl.len().over(key).cast(pl.Int64),
            rank=pl.int_range(1, pl.len() + 1, dtype=pl.Int64).over("_place"),
        )
        .select("language", *key, "probability", "entropy", "members", "rank")
    )


def probability_bar(counts: Counts, totals: pl.DataFrame, *, units: int, quantile: float = 0.95) -> float:
    """The `quantile` of all n = units x languages activation probabilities: the round(quantile * n)-th smallest.

    Units without a row count as 0. `round` is Python's (halves to even); the first is the lowest. Parameters and
    errors as in `lape`.
    """
    rows, totals, key = _rows(counts, totals)
    return _bar(rows, totals, key, units, quantile)


def _rows(counts: Counts, totals: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame, list[str]]:
    firing.require(counts, ["layer", "unit", "language", "tokens"], "counts")
    totals = firing.check_totals(totals)
    key = firing.unit_key(counts)
    rows = (
        counts.lazy()
        .filter(pl.col("tokens") > 0)
        .select(*key, pl.col("language").cast(pl.String), "tokens")
        .collect(engine="in-memory")
    )
    firing.check_once(rows, key)
    return firing.probabilities(rows, totals), totals, key


def _bar(rows: pl.DataFrame, totals: pl.DataFrame, key: list[str], units: int, quantile: float) -> float:
    if not 0 <= quantile <= 1:
        raise UserError(f"quantile: {quantile} is not between 0 and 1")
    firing_units = rows.select(pl.struct(key).n_unique()).item() if len(rows) else 0
    if firing_units > units:
        raise UserError(f"units: {units} units in all, but the counts hold {firing_units}")
    size = units * len(totals)
    place = max(1, round(quantile * size))  # counted from 1
    zeros = size - len(rows)
    return 0.0 if place <= zeros else float(rows["probability"].sort()[place - zeros - 1])
