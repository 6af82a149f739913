"""The features in the browser, and how often each fires in every language."""

from collections.abc import Sequence

import polars as pl

KEY = ["hookpoint", "layer", "unit"]


def units(
    selected: pl.DataFrame, candidates: pl.DataFrame, languages: Sequence[str], hookpoints: Sequence[str],
    shared: int | None, limit: int | None = None,
) -> pl.DataFrame:  # fmt: skip
    """The selected features, and others that several languages share.

    `selected`: the rows of kind `sae` of `data/scores/features.parquet`. `candidates`: from `sae_lape` with the same
    thresholds, `members=None` and `top=None`. `languages`, `hookpoints`: their orders. `shared`: number of shared
    features to add to the selected ones, those of lowest entropy; None adds all. `limit`: maximum number of selected
    features, those of lowest rank in their language; None: all.

    Returns
    -------
    One row per feature, by hookpoint and unit: `hookpoint`, `layer`, `unit`, `kind` (`specific`: of one language,
    `shared`: of several), `languages` (list, in their order), `members` (how many), `entropy` (nats).
    """
    found = (
        candidates.sort(pl.col("language").cast(pl.Enum(languages)), maintain_order=True)
        .group_by(KEY, maintain_order=True)
        .agg(pl.col("language").alias("languages"), pl.col("members").first(), pl.col("entropy").first())
        .sort("entropy", "layer", "unit", "hookpoint")
    )
    first = selected
    if limit is not None:
        first = selected.sort("rank", pl.col("language").cast(pl.Enum(languages)), *KEY).unique(
            KEY, maintain_order=True
        )
        first = first.head(limit)
    chosen = found.join(first, on=KEY, how="semi", maintain_order="left")
    others = found.join(selected, on=KEY, how="anti", maintain_order="left").filter(pl.col("members") > 1)
    return (
        pl.concat([chosen, others if shared is None else others.head(shared)])
        .with_columns(kind=pl.when(pl.col("members") == 1).then(pl.lit("specific")).otherwise(pl.lit("shared")))
        .sort(pl.col("hookpoint").cast(pl.Enum(hookpoints)), "unit")
        .select(*KEY, "kind", "languages", "members", "entropy")
    )


def probabilities(features: pl.DataFrame, counts: pl.DataFrame, totals: pl.DataFrame) -> pl.DataFrame:
    """P(l, u) = c / T of every feature in every language.

    `features`: from `units`. `counts`: `hookpoint`, `layer`, `unit`, `language`, `tokens`; rows without a firing may be
    missing. `totals`: `language`, `tokens`, in the order wanted.

    Returns
    -------
    `hookpoint`, `layer`, `unit`, `language`, `tokens` (on which it fires), `probability`: a row for every language, in
    the order of `features`, then of `totals`.
    """
    size = totals.select("language", pl.col("tokens").alias("_all"))
    return (
        features.select(KEY)
        .join(size, how="cross", maintain_order="left_right")
        .join(counts.select(*KEY, "language", "tokens"), on=[*KEY, "language"], how="left", maintain_order="left")
        .with_columns(pl.col("tokens").fill_null(0))
        .with_columns(probability=pl.col("tokens") / pl.col("_all"))
        .drop("_all")
    )
