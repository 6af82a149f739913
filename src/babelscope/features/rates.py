"""Firing counts as sparse Polars frames: checks of their content, probabilities and entropies."""

from collections.abc import Iterator, Sequence

import polars as pl

from babelscope.core.errors import UserError

Counts = pl.DataFrame | pl.LazyFrame

# Decimals of entropies. Units with the same profile then tie, although their floating-point sums differ in the last
# bit, and the tie is broken by (layer, unit) on every machine.
DECIMALS = 12


def columns(counts: Counts) -> list[str]:
    """The names of the columns, without reading a row."""
    return counts.collect_schema().names()


def unit_key(counts: Counts) -> list[str]:
    """The columns that name a unit: `hookpoint` (if there is one), `layer`, `unit`."""
    return [name for name in ("hookpoint", "layer", "unit") if name in columns(counts)]


def tie_break(key: Sequence[str]) -> list[str]:
    """The unit key in the order in which ties break: `layer`, `unit`, then `hookpoint` (if there is one)."""
    return sorted(key, key=["layer", "unit", "hookpoint"].index)


def require(frame: Counts, needed: Sequence[str], what: str) -> None:
    """Raise a `UserError` unless `frame` has the columns `needed`; `what` names the frame in the message."""
    missing = [name for name in needed if name not in columns(frame)]
    if missing:
        raise UserError(f"{what}: no column {', '.join(missing)}; it has {', '.join(columns(frame))}")


def check_shares(**shares: float) -> None:
    """Raise a `UserError` unless all are between 0 and 1."""
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise UserError(f"{name}: {share} is not between 0 and 1")


def check_totals(totals: pl.DataFrame, *extra: str) -> pl.DataFrame:
    """`totals` with `language` as strings, `tokens` and `extra`.

    Raises
    ------
    UserError: a column or a value is missing, or a language has two rows.
    """
    require(totals, ["language", "tokens", *extra], "totals")
    totals = totals.select(pl.col("language").cast(pl.String), "tokens", *extra)
    if sum(totals.null_count().row(0)):
        raise UserError("totals: a value is missing")
    twice = totals.filter(pl.col("language").is_duplicated())["language"].unique().sort().to_list()
    if twice:
        raise UserError(f"totals: {', '.join(twice)} has more than one row")
    return totals


def by_layer(counts: Counts, names: Sequence[str]) -> Iterator[pl.DataFrame]:
    """The columns `names` of `counts`, one layer at a time in ascending order, so that memory is bounded by a layer.

    Rows without a firing (tokens == 0) are left out. If no rows are left, one empty frame with the schema is yielded.
    """
    lazy = counts.lazy()
    layers = lazy.select(pl.col("layer").unique()).collect(engine="in-memory")["layer"].sort().to_list()
    for layer in layers or [0]:
        rows = lazy.filter(pl.col("layer") == layer, pl.col("tokens") > 0).select(names)
        yield rows.with_columns(pl.col("language").cast(pl.String)).collect(engine="in-memory")


def join_totals(rows: pl.DataFrame, totals: pl.DataFrame) -> pl.DataFrame:
    """`rows` with the columns of `totals`; a `UserError` if a language of `rows` is not in it."""
    unknown = set(rows["language"].unique().to_list()) - set(totals["language"].to_list())
    if unknown:
        raise UserError(f"counts: no totals for {', '.join(sorted(str(name) for name in unknown))}")
    return rows.join(totals, on="language", how="left")


def check_once(rows: pl.DataFrame, key: Sequence[str]) -> None:
    """Raise a `UserError` if a unit has two rows for one language (two hookpoints mixed, or counts not summed)."""
    rows = rows.select(*key, "language")
    languages = rows.group_by(key).agg(found=pl.len(), different=pl.col("language").n_unique())
    again = rows.join(languages.filter(pl.col("found") > pl.col("different")), on=key, how="semi")
    again = again.filter(pl.struct(again.columns).is_duplicated())
    if len(again):
        first = ", ".join(f"{name} {value}" for name, value in again.sort(again.columns).row(0, named=True).items())
        raise UserError(f"counts: more than one row for {first}")


def probabilities(rows: pl.DataFrame, totals: pl.DataFrame) -> pl.DataFrame:
    """`rows` with `probability`, P(l, u) = c(l, u) / T(l) (float64, in 0 to 1).

    Raises
    ------
    UserError: a language is unknown, or a unit fires on more tokens than the language has.
    """
    size = totals.select("language", pl.col("tokens").alias("_tokens"))
    rows = join_totals(rows, size)
    impossible = rows.filter(pl.col("tokens") > pl.col("_tokens"))
    if len(impossible):
        worst = impossible.sort("language", "layer", "unit").row(0, named=True)
        raise UserError(
            f"counts: layer {worst['layer']}, unit {worst['unit']} fires on {worst['tokens']} tokens "
            f"of {worst['_tokens']} in {worst['language']}: the totals are those of other counts"
        )
    # Series by Series: an expression would multiply by the reciprocal of a total if there is only one.
    return rows.with_columns((rows["tokens"] / rows["_tokens"]).alias("probability")).drop("_tokens")


def entropies(rows: pl.DataFrame, key: Sequence[str]) -> pl.DataFrame:
    """One row per unit: `entropy` in nats and `peak`, the highest probability.

    H(u) = -sum_l P' ln P' with P' = P / sum_l P (Tang et al. 2024, arXiv 2402.16438; 0 ln 0 = 0, so
    languages without a row add nothing). The terms are summed in ascending order: the result depends neither on the
    order of the rows nor on the names of the languages. It is rounded to 12 decimals.

    `rows` has the columns `key` and `probability` > 0, at most one row per unit and language.
    """
    ascending = pl.col("probability").sort()
    share = ascending / ascending.sum()
    # 0 - x rather than -x: a unit of one language has entropy 0, not -0.
    entropy = (0.0 - (share * share.log()).sum()).round(DECIMALS)
    return rows.group_by(key).agg(entropy=entropy, peak=pl.col("probability").max())
