"""Which layer and which strength each method gets, from development prompts alone (successive halving).

Round one: every place and strength of a method on few prompts. Round two: the `KEPT` best settings on further prompts.
A setting is the same for all languages, since a choice for each language from few prompts follows chance.
(Jamieson and Talwalkar 2016, arXiv 1502.07943, for the halving.)
"""

import polars as pl

from babelscope.steering.judge import harmonic

# Settings of a method that round two tries.
KEPT = 2
_SETTING = ["method", "place", "strength"]


def scores(rows: pl.DataFrame) -> pl.DataFrame:
    """The settings of each method and language with `score`, `forced`, `relevant`, `distinct_2`, and `prompts`.

    `rows` holds one answer each: the columns of a setting (`method`, `language`, `place`, `strength`), `forced`,
    `relevant`, `distinct_2`. The score is the harmonic mean of the shares of forced and of relevant answers, both with
    one half of an answer added to `prompts`, since two answers are few: `(sum + 0.5) / (prompts + 1)`.
    """
    smooth = [((pl.col(name).sum() + 0.5) / (pl.len() + 1)).alias(f"_{name}") for name in ("forced", "relevant")]
    plain = [pl.col(name).mean() for name in ("forced", "relevant", "distinct_2")]
    table = rows.group_by("method", "language", "place", "strength", maintain_order=True).agg(
        *plain, *smooth, pl.len().alias("prompts")
    )
    return table.with_columns(score=harmonic(pl.col("_forced"), pl.col("_relevant"))).drop("_forced", "_relevant")


def settings(table: pl.DataFrame) -> pl.DataFrame:
    """`method`, `place`, `strength`, `score`: the mean over the languages, the best setting first.

    A language without a vector of the method at a place has a score of 0 there. Equal scores: the higher distinct-2,
    then the smaller strength.
    """
    mean = pl.col("score").sum() / max(1, table["language"].n_unique())
    means = table.group_by(_SETTING, maintain_order=True).agg(mean, pl.col("distinct_2").mean())
    return means.sort("score", "distinct_2", -pl.col("strength"), descending=True, maintain_order=True)


def best(table: pl.DataFrame, count: int) -> pl.DataFrame:
    """The rows of `table` with the `count` best settings of each method."""
    kept = settings(table).group_by("method", maintain_order=True).head(count)
    return table.join(kept, on=_SETTING, how="semi", maintain_order="left")
