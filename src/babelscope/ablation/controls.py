"""Random units that fire as often on a language as its own do: what "more firings, more damage" alone would cost."""

import zlib

import numpy as np
import polars as pl
from numpy.typing import NDArray

# A control unit is drawn from so many whose firing rates are nearest to that of the unit it stands for.
NEAR = 20


def matched(
    counts: pl.DataFrame,
    totals: pl.DataFrame,
    features: pl.DataFrame,
    hookpoint: str,
    language: str,
    *,
    ratio: float,
    draws: int,
    seed: int,
) -> list[list[int]]:
    """Random units of `hookpoint` that fire as often on `language` as those that it owns there.

    For every owned unit u, from the one that fires most down: one unit at random of the `NEAR` not yet drawn whose
    log c(l, u) is nearest to its own (c(l, u): the tokens of l on which u fires; as all are counted on the same
    tokens, counts are matched as rates). Among units that are not selected few fire as often as the owned ones
    that fire most; so more are drawn, each in the same way for what is lacking, until the draw fires at least as often
    in all. Not drawn are units that never fire on this language, that are specific to any, and that would be specific
    to this one if they fired often enough for the thresholds of `sae_lape`: P(l', u) < ratio * P(l, u) in every other
    language l', P = c / T. They are no random units but more of its own. A draw holds each unit once, and fires less
    only where there are no more units.

    Parameters
    ----------
    counts: `unit`, `language`, `tokens` of `hookpoint`.
    totals: `language`, `tokens`: T(l).
    features: `hookpoint`, `unit`, `language`: the selection.
    hookpoint, language: where, and whose units are matched.
    ratio: `score.ratio`, above 0, at most 1.
    draws: how many.
    seed: of the draws; those of one hookpoint and language depend on no other.

    Returns
    -------
    Unit numbers of each draw, ascending.
    """
    here = features.filter(pl.col("hookpoint") == hookpoint)
    rates = counts.filter((pl.col("language") == language) & (pl.col("tokens") > 0)).select("unit", "tokens")
    taken = [*here["unit"].unique(), *_of_one(counts, totals, language, ratio)]
    pool = rates.filter(~pl.col("unit").is_in(taken)).sort("tokens", "unit")
    mine = here.filter(pl.col("language") == language).select("unit").join(rates, on="unit", how="left")
    wanted = mine.sort("tokens", "unit", descending=True)["tokens"].fill_null(1).to_numpy()
    rate, units = pool["tokens"].to_numpy(), pool["unit"].to_list()
    names = [zlib.crc32(name.encode()) for name in (hookpoint, language)]
    return [
        sorted(units[i] for i in _draw(rate, wanted, np.random.default_rng([seed, *names, draw])))
        for draw in range(draws)
    ]


def _of_one(counts: pl.DataFrame, totals: pl.DataFrame, language: str, ratio: float) -> pl.Series:
    """Units that have this language for their only member."""
    fired = counts.filter(pl.col("tokens") > 0).join(totals.select("language", total="tokens"), on="language")
    share = pl.col("tokens") / pl.col("total")
    members = fired.filter(share >= ratio * share.max().over("unit"))
    return members.filter(pl.len().over("unit") == 1, pl.col("language") == language)["unit"]


def _draw(pool: NDArray[np.int64], wanted: NDArray[np.int64], random: np.random.Generator) -> list[int]:
    """Indices of the ascending `pool`: one near to every value wanted, and more until their sum is reached."""
    free, log_pool = np.ones(len(pool), dtype=bool), np.log(pool)
    drawn: list[int] = []
    values, lacking = list(wanted), int(wanted.sum())
    while free.any() and (values or lacking > 0):
        value = np.log(values.pop(0) if values else lacking)
        at, reach = int(np.searchsorted(log_pool, value)), NEAR + len(drawn)
        window = np.arange(max(0, at - reach), min(len(pool), at + reach))
        window = window[free[window]]
        nearest = window[np.argsort(np.abs(log_pool[window] - value), kind="stable")[:NEAR]]
        chosen = int(random.choice(nearest))
        free[chosen] = False
        drawn.append(chosen)
        lacking -= int(pool[chosen])
    return drawn
