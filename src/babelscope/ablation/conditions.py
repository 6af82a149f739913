"""What is ablated, and on which texts: each language's units, at all hookpoints and at each alone, and controls.

Controls are random units that fire as often on a language as its own do: what "more firings, more damage" would cost.
"""

import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

# A control unit is drawn from so many whose firing rates are nearest to that of the unit that it replaces.
NEAR = 20


class Conditions(NamedTuple):
    """Sets of units to take out.

    Attributes
    ----------
    keys: one row per condition: `condition` (its number), `ablated` (language), `hookpoint` (null: all together),
        `control` (draw number; null: the language's own units).
    units: by hookpoint, the unit numbers of every condition.
    """

    keys: pl.DataFrame
    units: dict[str, list[list[int]]]

    def only(self, rows: Sequence[int]) -> "Conditions":
        """The conditions `rows`, numbered anew."""
        keys = self.keys[list(rows)].with_columns(condition=pl.int_range(len(rows), dtype=pl.Int64, eager=True))
        return Conditions(keys, {name: [sets[row] for row in rows] for name, sets in self.units.items()})

    def asked(self, language: Sequence[str], tokens: NDArray[np.int64], others_tokens: int | None) -> NDArray[np.bool_]:
        """Which pairs of condition and text are evaluated.

        At all hookpoints together: all texts of the language itself, and of each other language a sample of about
        `others_tokens` tokens. Under a control: all texts of the language, and in each half of the texts (`first_half`)
        a sample of every second other language, in all half as many tokens as the language has. With a hookpoint
        alone: a quarter of the language's texts, and of the others as under a control in the first half.
        A sample has at least one text in each half, and the texts of a smaller sample are in every larger one.

        Parameters
        ----------
        language: of each text; the texts in `by_length` order, so that a sample has all lengths.
        tokens: target tokens of each text.
        others_tokens: None: all texts.

        Returns
        -------
        Bool `[conditions, texts]`.
        """
        names, codes, count = np.unique(np.array(language, dtype=str), return_inverse=True, return_counts=True)
        total, place = np.bincount(codes, weights=tokens, minlength=len(names)), _places(codes)
        is_first = first_half(language)
        in_half = np.where(is_first, 2 * place, (2 * place - 0.5) % 1)  # evenly spread in both halves together, too
        one = 2.5 / count  # one text in each half
        share = np.maximum(1.0 if others_tokens is None else others_tokens / np.maximum(total, 1), one)
        less = np.minimum(share, np.maximum(1 / max(1, len(names) - 1), one))
        number = {name: code for code, name in enumerate(names)}
        ablated = np.array([number.get(name, -1) for name in self.keys["ablated"]])[:, None]
        is_alone, is_control = (self.keys[name].is_not_null().to_numpy()[:, None] for name in ("hookpoint", "control"))
        is_turn = ((ablated - codes) % 2 == 1) == is_first
        others = np.where(is_alone | is_control, (in_half <= less[codes]) & is_turn, in_half <= share[codes])
        others &= ~is_alone | is_first
        own = ~is_alone | (place <= np.maximum(0.25, 0.5 / count)[codes])
        wanted: NDArray[np.bool_] = np.where(ablated == codes, own, others)
        return wanted


def first_half(language: Sequence[str]) -> NDArray[np.bool_]:
    """The half of each language's texts that is measured first, bool `[texts]`; `language` of each text."""
    is_first: NDArray[np.bool_] = _places(np.unique(np.array(language, dtype=str), return_inverse=True)[1]) <= 0.5
    return is_first


def _places(codes: NDArray[np.int64]) -> NDArray[np.float64]:
    """Places in 0..1 of texts whose languages are `codes`, for each language evenly spread (`_spread`)."""
    place = np.empty(len(codes))
    for code in np.unique(codes):
        rows = np.flatnonzero(codes == code)
        place[rows] = _spread(len(rows))
    return place


def _spread(count: int) -> NDArray[np.float64]:
    """Places of `count` texts in 0..1: those below any limit are the limit's share of them, and lie evenly.

    The order of van der Corput's sequence (0, 1/2, 1/4, 3/4, ...), the text in the middle first.
    """
    numbers, terms = np.arange(count), np.zeros(count)
    for bit in range(max(1, count).bit_length()):
        terms += ((numbers >> bit) & 1) / 2 ** (bit + 1)
    places: NDArray[np.float64] = (terms.argsort().argsort() + 0.5) / max(1, count)
    return np.roll(places, count // 2)


def conditions(
    features: pl.DataFrame,
    counts: Mapping[str, pl.DataFrame],
    totals: pl.DataFrame,
    languages: Sequence[str],
    *,
    ratio: float,
    by_layer: bool,
    draws: int,
    seed: int,
) -> Conditions:
    """Every condition of a run.

    Parameters
    ----------
    features: `hookpoint`, `unit`, `language`.
    counts: by hookpoint, `unit`, `language`, `tokens` (read for controls only).
    totals: `language`, `tokens` (of the language, on which units were counted).
    languages: in the order wanted.
    ratio: `score.ratio`, see `matched`.
    by_layer: also each hookpoint alone (without controls).
    draws: controls per language; 0 for none.
    seed: of the controls.
    """
    own: dict[tuple[str, str], list[int]] = {}
    random: dict[tuple[str, str], list[list[int]]] = {}
    for hookpoint, table in counts.items():
        for name in languages:
            here = features.filter(pl.col("hookpoint") == hookpoint, pl.col("language") == name)
            own[hookpoint, name] = here["unit"].sort().to_list()
            random[hookpoint, name] = matched(
                table, totals, features, hookpoint, name, ratio=ratio, draws=draws, seed=seed
            )
    rows: list[tuple[str, str | None, int | None]] = [(name, None, None) for name in languages]
    rows += [(name, None, draw) for name in languages for draw in range(draws)]
    rows += [(name, alone, None) for alone in counts if by_layer for name in languages]

    def units(hookpoint: str, ablated: str, alone: str | None, draw: int | None) -> list[int]:
        if draw is not None:
            return random[hookpoint, ablated][draw]
        return own[hookpoint, ablated] if alone in (None, hookpoint) else []

    schema = {"ablated": pl.String, "hookpoint": pl.String, "control": pl.Int32}
    keys = pl.DataFrame(rows, schema=schema, orient="row").with_row_index("condition")
    return Conditions(
        keys.with_columns(pl.col("condition").cast(pl.Int64)),
        {hookpoint: [units(hookpoint, *row) for row in rows] for hookpoint in counts},
    )


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
