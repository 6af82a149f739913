"""Random units that fire as often on a language as its own do: what "more units, more damage" alone would cost."""

import zlib

import numpy as np
import polars as pl
from numpy.typing import NDArray

# A control unit is drawn from so many whose firing rates are nearest to that of the unit it stands for.
NEAR = 20


def matched(
    counts: pl.DataFrame, features: pl.DataFrame, hookpoint: str, language: str, draws: int, seed: int
) -> list[list[int]]:
    """As many random units of `hookpoint` as `language` owns there, with matched firing rates on it.

    For every owned unit u, from the one that fires most down: one unit at random of the `NEAR` not yet drawn whose
    log c(l, u) is nearest to its own (METHODS: c(l, u) the tokens of l on which u fires; as all are counted on the same
    tokens, counts are matched as rates). Units that are specific to any language, or never fire on this one,
    are not drawn. A draw holds each unit once, and fewer than are owned only where there are no more.

    Parameters
    ----------
    counts: `unit`, `language`, `tokens` of `hookpoint`.
    features: `hookpoint`, `unit`, `language`: the selection.
    hookpoint, language: where, and whose units are matched.
    draws: how many.
    seed: of the draws; those of one hookpoint and language depend on no other.

    Returns
    -------
    Unit numbers of each draw, ascending.
    """
    here = features.filter(pl.col("hookpoint") == hookpoint)
    rates = counts.filter((pl.col("language") == language) & (pl.col("tokens") > 0)).select("unit", "tokens")
    taken = here["unit"].unique().to_list()
    pool = rates.filter(~pl.col("unit").is_in(taken)).sort("tokens", "unit")
    mine = here.filter(pl.col("language") == language).select("unit").join(rates, on="unit", how="left")
    wanted = np.log(mine.sort("tokens", "unit", descending=True)["tokens"].fill_null(1).to_numpy())
    log_rate, units = np.log(pool["tokens"].to_numpy()), pool["unit"].to_list()
    names = [zlib.crc32(name.encode()) for name in (hookpoint, language)]
    return [
        sorted(units[i] for i in _draw(log_rate, wanted, np.random.default_rng([seed, *names, draw])))
        for draw in range(draws)
    ]


def _draw(pool: NDArray[np.float64], wanted: NDArray[np.float64], random: np.random.Generator) -> list[int]:
    """For every value wanted, an index of the ascending `pool` that is not drawn yet, near to it."""
    free = np.ones(len(pool), dtype=bool)
    drawn: list[int] = []
    for value in wanted[: len(pool)]:
        at, reach = int(np.searchsorted(pool, value)), NEAR + len(drawn)
        window = np.arange(max(0, at - reach), min(len(pool), at + reach))
        window = window[free[window]]
        nearest = window[np.argsort(np.abs(pool[window] - value), kind="stable")[:NEAR]]
        chosen = int(random.choice(nearest))
        free[chosen] = False
        drawn.append(chosen)
    return drawn
