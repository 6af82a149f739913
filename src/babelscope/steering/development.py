"""Which layer and which strength each method gets, from development prompts alone (successive halving).

Round one: every place and strength of a method on few prompts. Round two: the `KEPT` best settings of each language on
further prompts. The place of a method is the same for all languages, the strength is each language's own.
(Jamieson and Talwalkar 2016, arXiv 1502.07943, for the halving.)
"""

import polars as pl

from babelscope.steering.judge import harmonic

# Settings of a method and language that round two tries.
KEPT = 2
_KEY = ["method", "language", "place", "strength"]


def scores(rows: pl.DataFrame) -> pl.DataFrame:
    """The settings of each method and language with `score`, `forced`, `relevant`, `distinct_2`, and `prompts`.

    `rows` holds one answer each: the columns of a setting (`method`, `language`, `place`, `strength`), `forced`,
    `relevant`, `distinct_2`. The score is the harmonic mean of the shares of forced and of relevant answers, both with
    one half of an answer added to `prompts`, since two answers are few: `(sum + 0.5) / (prompts + 1)`.
    """
    smooth = [((pl.col(name).sum() + 0.5) / (pl.len() + 1)).alias(f"_{name}") for name in ("forced", "relevant")]
    plain = [pl.col(name).mean() for name in ("forced", "relevant", "distinct_2")]
    table = rows.group_by(_KEY, maintain_order=True).agg(*plain, *smooth, pl.len().alias("prompts"))
    return table.with_columns(score=harmonic(pl.col("_forced"), pl.col("_relevant"))).drop("_forced", "_relevant")


def places(table: pl.DataFrame) -> pl.DataFrame:
    """`method`, `place`, `score`: the mean over the languages of the best strength's score, best place first.

    A language without a vector of the method at a place has a score of 0 there.
    """
    best = table.group_by("method", "place", "language", maintain_order=True).agg(pl.col("score").max())
    mean = pl.col("score").sum() / max(1, table["language"].n_unique())
    means = best.group_by("method", "place", maintain_order=True).agg(mean)
    return means.sort("score", descending=True, maintain_order=True)


def promising(table: pl.DataFrame) -> pl.DataFrame:
    """The settings that round two tries: at each method's best place, the `KEPT` best of every language.

    Equal scores: the higher distinct-2, then the smaller strength.
    """
    place = places(table).unique("method", keep="first", maintain_order=True).select("method", "place")
    return best(table.join(place, on=["method", "place"], how="semi"), KEPT)


def best(table: pl.DataFrame, count: int) -> pl.DataFrame:
    """The `count` best settings of each method and language, best first."""
    ranked = table.sort("score", "distinct_2", -pl.col("strength"), descending=True, maintain_order=True)
    return ranked.group_by("method", "language", maintain_order=True).head(count)
