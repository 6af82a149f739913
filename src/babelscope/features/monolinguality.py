"""Monolinguality: how much more active a unit is on one language than on the others."""

import polars as pl

from babelscope.features import rates
from babelscope.features.rates import Counts


def monolinguality(counts: Counts, totals: pl.DataFrame, units: pl.DataFrame | None = None) -> pl.DataFrame:
    """Mean activation on a language minus the mean of its means on the others (Deng et al. 2025, arXiv 2505.05111).

    nu(l, u) = m(l, u) - mean over l' != l of m(l', u), where m(l, u) = sum of the activations / T(l), per token. A
    language on which the unit never fires has m = 0; a language without tokens (T = 0) is left out. With one language,
    nu = m.

    Parameters
    ----------
    counts: `layer`, `unit`, `language`, `tokens`, `sum` (of the activations), and `hookpoint` if there are several.
        A lazy frame is read one layer at a time.
    totals: `language`, `tokens`; its order of the languages is the order of the result.
    units: `layer`, `unit` (and `hookpoint`) of the units wanted; rows may repeat. None: all units.

    Returns
    -------
    `language`, (`hookpoint`,) `layer`, `unit`, `monolinguality` (activation per token) for every row with a firing,
    sorted by language, then monolinguality descending, then (layer, unit).

    Raises
    ------
    UserError: a column is missing, a language has no total, or a unit has two rows for one language.
    """
    rates.require(counts, ["layer", "unit", "language", "tokens", "sum"], "counts")
    totals = rates.check_totals(totals)
    key = rates.unit_key(counts)
    size = totals.select("language", pl.col("tokens").alias("_tokens")).with_row_index("_position")
    others = max(1, len(totals.filter(pl.col("tokens") > 0)) - 1)
    parts = []
    for rows in rates.by_layer(counts, [*key, "language", "tokens", "sum"]):
        if units is not None:
            rows = rows.join(units, on=key, how="semi")
        rates.check_once(rows, key)
        means = rates.join_totals(rows, size).with_columns(_mean=pl.col("sum").cast(pl.Float64) / pl.col("_tokens"))
        # Summed in ascending order: rounding then does not depend on the order of the rows.
        sums = means.group_by(key).agg(_all=pl.col("_mean").sort().sum())
        nu = pl.col("_mean") - (pl.col("_all") - pl.col("_mean")) / others
        parts.append(means.join(sums, on=key).select("_position", "language", *key, nu.alias("monolinguality")))
    return pl.concat(parts).sort("_position", -pl.col("monolinguality"), *rates.tie_break(key)).drop("_position")
