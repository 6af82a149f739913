"""Similarity of languages by the units that they share."""

from collections.abc import Sequence

import polars as pl

from babelscope.features.rates import unit_key


def similarity(candidates: pl.DataFrame, languages: Sequence[str]) -> pl.DataFrame:
    """The Jaccard index |A & B| / |A | B| of every two languages, A and B being the units of which each is a member.

    Parameters
    ----------
    candidates: `layer`, `unit` (and `hookpoint`), `language`: one row per unit and member language, as
        `sae_lape(..., members=None)` returns them.
    languages: the order of the result.

    Returns
    -------
    `language`, `other`, `units` (of both), `jaccard` (0 to 1; None if neither has a unit), one row per ordered pair,
    those of a language with itself included.
    """
    key = unit_key(candidates)
    members = candidates.select(*key, "language").unique()
    both = members.join(members.rename({"language": "other"}), on=key).group_by("language", "other").len("units")
    units = {name: 0 for name in languages} | dict(members.group_by("language").len().iter_rows())
    sizes = pl.DataFrame({"language": list(languages), "_a": [units[name] for name in languages]})
    grid = sizes.join(sizes.rename({"language": "other", "_a": "_b"}), how="cross", maintain_order="left_right")
    either = pl.col("_a") + pl.col("_b") - pl.col("units")
    return (
        grid.join(both, on=["language", "other"], how="left", maintain_order="left")
        .with_columns(pl.col("units").cast(pl.Int64).fill_null(0))
        .with_columns(jaccard=pl.when(either > 0).then(pl.col("units") / either))
        .select("language", "other", "units", "jaccard")
    )
