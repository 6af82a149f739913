"""What is ablated and on which texts: each language's units, at all hookpoints or at one alone, and controls.

Controls are random units that fire as often on a language as its own: they show what any units of this rate would cost.
A second kind of control is drawn among units of the language's script.
"""

import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import langcodes
import numpy as np
import polars as pl
from numpy.typing import NDArray

# Units from which a control unit is drawn: those whose firing rates are nearest to that of the unit it replaces.
NEAR = 20
# How many of a language's units are removed for the curve of the effect over their number.
TOP = (1, 2, 5, 10)
# CLDR's codes for scripts that are written with many Han characters.
_HAN = ("Hans", "Hant", "Jpan")


class Conditions(NamedTuple):
    """Sets of units to remove.

    Attributes
    ----------
    keys: one row per condition: `condition` (its number), `ablated` (language), `hookpoint` (null: all together),
        `control` (draw number; null: the language's own units), `top` (how many of the language's units, those of the
        largest effect first; null: all), `script` (bool: a control drawn among units of the language's script).
    units: by hookpoint, the unit numbers of every condition.
    """

    keys: pl.DataFrame
    units: dict[str, list[list[int]]]

    def only(self, rows: Sequence[int]) -> "Conditions":
        """The conditions `rows`, numbered anew."""
        keys = self.keys[list(rows)].with_columns(condition=pl.int_range(len(rows), dtype=pl.Int64, eager=True))
        return Conditions(keys, {name: [sets[row] for row in rows] for name, sets in self.units.items()})

    def whole(self) -> pl.Series:
        """Which conditions remove all units of a language at all hookpoints, bool `[conditions]`."""
        return self.keys.select(pl.all_horizontal(pl.col("hookpoint", "control", "top").is_null())).to_series()

    def asked(self, language: Sequence[str], tokens: NDArray[np.int64], others_tokens: int | None) -> NDArray[np.bool_]:
        """Which pairs of condition and text are evaluated.

        All hookpoints together: all texts of the ablated language, and a sample of about `others_tokens` tokens of each
        other language. A control: all texts of the ablated language, and in each half of the texts (`first_half`) a
        sample of every second other language; all samples together have half as many tokens as the language. One
        hookpoint alone, or the `top` units: an eighth of the ablated language's texts, and in the first half a
        control's samples of every fourth other language, or every second of few (a control of the `top` units: none).
        A sample has at least one text in each half, and a larger sample contains every smaller one.

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
        in_half = np.where(is_first, 2 * place, (2 * place - 0.5) % 1)  # also evenly spread over both halves together
        one = 2.5 / count  # the share of one text in each half
        share = np.maximum(1.0 if others_tokens is None else others_tokens / np.maximum(total, 1), one)
        less = np.minimum(share, np.maximum(1 / max(1, len(names) - 1), one))
        number = {name: code for code, name in enumerate(names)}
        ablated = np.array([number.get(name, -1) for name in self.keys["ablated"]])[:, None]
        alone, control, top = (
            self.keys[name].is_not_null().to_numpy()[:, None] for name in ("hookpoint", "control", "top")
        )
        is_small = alone | top
        distance, step = ablated - codes, 4 if len(names) > 4 else 2  # so that each has another language
        is_turn = np.where(is_small, is_first & (distance % step == 1), (distance % 2 == 1) == is_first)
        others = np.where(is_small | control, (in_half <= less[codes]) & is_turn, in_half <= share[codes])
        others &= ~(top & control)
        own = ~is_small | (place <= np.maximum(0.125, 1.5 / count)[codes])  # two texts at least
        wanted: NDArray[np.bool_] = np.where(ablated == codes, own, others)
        return wanted


def first_half(language: Sequence[str]) -> NDArray[np.bool_]:
    """The half of each language's texts that is measured first, bool `[texts]`; `language` of each text."""
    is_first: NDArray[np.bool_] = _places(np.unique(np.array(language, dtype=str), return_inverse=True)[1]) <= 0.5
    return is_first


def _places(codes: NDArray[np.int64]) -> NDArray[np.float64]:
    """A place in 0..1 for every text, evenly spread within each language of `codes` (see `_spread`)."""
    place = np.empty(len(codes))
    for code in np.unique(codes):
        rows = np.flatnonzero(codes == code)
        place[rows] = _spread(len(rows))
    return place


def _spread(count: int) -> NDArray[np.float64]:
    """Places of `count` texts in 0..1, so that those with places below x are a share x of the texts, evenly spread.

    The order is that of van der Corput's sequence (0, 1/2, 1/4, 3/4, ...), beginning with the text in the middle.
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
    script_draws: int = 0,
    ranking: pl.DataFrame | None = None,
) -> Conditions:
    """Every condition of a run.

    Parameters
    ----------
    features: `hookpoint`, `unit`, `language`.
    counts: by hookpoint, `unit`, `language`, `tokens` (read for controls only).
    totals: `language`, `tokens` (on which the units were counted).
    languages: in the order wanted.
    ratio: `score.ratio`, see `matched`.
    by_layer: also each hookpoint alone (without controls).
    draws: controls per language; 0 for none.
    seed: of the controls.
    script_draws: controls among units of the script, for each language that shares its script with another one.
    ranking: `hookpoint`, `unit`, `language`, `causal_rank`: also the units of the `TOP` first ranks of each language,
        with one control each if there are draws.
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
    rows: list[tuple[str, str | None, int | None, int | None, bool]]
    rows = [(name, None, None, None, False) for name in languages]
    rows += [(name, None, draw, None, False) for name in languages for draw in range(draws)]
    rows += [(name, alone, None, None, False) for alone in counts if by_layer for name in languages]
    tops = () if ranking is None else TOP
    rows += [
        (name, None, draw, top, False)
        for top in tops for draw in (None, 0)[: 1 + min(draws, 1)] for name in languages
    ]  # fmt: skip
    related = of_script(languages) if script_draws else {}
    rows += [(name, None, draw, None, True) for name in related for draw in range(script_draws)]
    bound = {
        (hookpoint, name): matched(
            table, totals, features, hookpoint, name, ratio=ratio, draws=script_draws, seed=seed, related=others
        )
        for hookpoint, table in counts.items() for name, others in related.items()
    }  # fmt: skip

    def units(
        hookpoint: str, ablated: str, alone: str | None, draw: int | None, top: int | None, script: bool
    ) -> list[int]:
        if ranking is not None and top is not None:
            first = ranking.filter(pl.col("causal_rank") <= top, hookpoint=hookpoint, language=ablated)["unit"]
            if draw is None:
                return first.sort().to_list()
            return matched(
                counts[hookpoint], totals, features, hookpoint, ablated, ratio=ratio, draws=1, seed=seed, own=first
            )[0]
        if draw is not None:
            return (bound if script else random)[hookpoint, ablated][draw]
        return own[hookpoint, ablated] if alone in (None, hookpoint) else []

    schema = {"ablated": pl.String, "hookpoint": pl.String, "control": pl.Int32, "top": pl.Int32, "script": pl.Boolean}
    keys = pl.DataFrame(rows, schema=schema, orient="row").with_row_index("condition")
    return Conditions(
        keys.with_columns(pl.col("condition").cast(pl.Int64)),
        {hookpoint: [units(hookpoint, *row) for row in rows] for hookpoint in counts},
    )


def of_script(languages: Sequence[str]) -> dict[str, list[str]]:
    """The other languages of the same script, by language; without those that share theirs with none.

    The script is that of the tag, or the one in which the language is mostly written according to CLDR. Japanese counts
    as Han, which it is in part.
    """
    script = {name: str(langcodes.Language.get(name).maximize().script) for name in languages}
    script = {name: "Hani" if code in _HAN else code for name, code in script.items()}
    found = {name: [one for one in languages if one != name and script[one] == script[name]] for name in languages}
    return {name: others for name, others in found.items() if others}


def control_rates(conditions: Conditions, counts: Mapping[str, pl.DataFrame]) -> dict[str, float]:
    """How often a language's controls fire on it, relative to its own units, by flat key.

    `control_rate/<language>`, and for controls among units of the script `control_script_rate/<language>`: means over
    the draws of (token, unit) pairs, as a share of those of the own units. It is below 1 if all units of which controls
    are drawn fire less often together. `counts`: as in `conditions`.
    """
    fires = np.zeros(len(conditions.keys))
    for hookpoint, table in counts.items():
        rows = table.select("language", "unit", "tokens").iter_rows()
        tokens = {(language, unit): count for language, unit, count in rows}
        sets = zip(conditions.keys["ablated"], conditions.units[hookpoint], strict=True)
        fires += [sum(tokens.get((language, unit), 0) for unit in units) for language, units in sets]
    keys = conditions.keys.with_columns(fires=fires).filter(pl.col("hookpoint").is_null(), pl.col("top").is_null())
    own = dict(keys.filter(pl.col("control").is_null(), pl.col("fires") > 0).select("ablated", "fires").iter_rows())
    drawn = keys.filter(pl.col("control").is_not_null(), pl.col("ablated").is_in([*own]))
    means = drawn.group_by("script", "ablated", maintain_order=True).agg(pl.col("fires").mean())
    return {
        f"control_{'script_' if script else ''}rate/{name}": mean / own[name]
        for script, name, mean in means.iter_rows()
    }


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
    own: pl.Series | None = None,
    related: Sequence[str] | None = None,
) -> list[list[int]]:
    """Random units of `hookpoint` that fire as often on `language` as its own units there.

    c(l, u) is the number of tokens of language l on which unit u fires. For every own unit, in descending order of c, a
    draw takes at random one of the `NEAR` remaining units whose log c is nearest. Few other units fire as often as the
    most frequent own ones. So the draw then takes further units in the same way, each near to the count that is still
    missing, until it fires at least as often in total or no units remain.

    Three kinds of units are never drawn: those that never fire on `language`, those that are specific to any language,
    and those that only the thresholds of `sae_lape` keep from being specific to `language`: P(l', u) < ratio * P(l, u)
    in every other language l', with P = c / T.

    Parameters
    ----------
    counts: `unit`, `language`, `tokens` of `hookpoint`.
    totals: `language`, `tokens`: T(l).
    features: `hookpoint`, `unit`, `language`: the selection.
    hookpoint, language: whose units are matched.
    ratio: `score.ratio`, above 0, at most 1.
    draws: number of draws.
    seed: of the draws; draws of one hookpoint and language do not depend on others.
    own: the units to match; None: all those of the selection.
    related: only units are drawn whose highest rate P among the other languages is in one of these.

    Returns
    -------
    Unit numbers of each draw, ascending.
    """
    here = features.filter(pl.col("hookpoint") == hookpoint)
    rates = counts.filter((pl.col("language") == language) & (pl.col("tokens") > 0)).select("unit", "tokens")
    excluded = [*here["unit"].unique(), *_of_one(counts, totals, language, ratio)]
    if related is not None:
        rates = rates.filter(pl.col("unit").is_in(_strongest_in(counts, totals, language, related).implode()))
    pool = rates.filter(~pl.col("unit").is_in(excluded)).sort("tokens", "unit")
    matching = here.filter(pl.col("language") == language)["unit"] if own is None else own
    own_rows = matching.to_frame("unit").join(rates, on="unit", how="left")
    wanted = own_rows.sort("tokens", "unit", descending=True)["tokens"].fill_null(1).to_numpy()
    rate, units = pool["tokens"].to_numpy(), pool["unit"].to_list()
    names = [zlib.crc32(name.encode()) for name in (hookpoint, language)]
    return [
        sorted(units[i] for i in _draw(rate, wanted, np.random.default_rng([seed, *names, draw])))
        for draw in range(draws)
    ]


def _of_one(counts: pl.DataFrame, totals: pl.DataFrame, language: str, ratio: float) -> pl.Series:
    """Units whose only member is `language`."""
    fired = counts.filter(pl.col("tokens") > 0).join(totals.select("language", total="tokens"), on="language")
    share = pl.col("tokens") / pl.col("total")
    members = fired.filter(share >= ratio * share.max().over("unit"))
    return members.filter(pl.len().over("unit") == 1, pl.col("language") == language)["unit"]


def _strongest_in(counts: pl.DataFrame, totals: pl.DataFrame, language: str, related: Sequence[str]) -> pl.Series:
    """Units whose highest rate outside `language` is in one of the languages `related`."""
    others = counts.filter(pl.col("language") != language).join(
        totals.select("language", total="tokens"), on="language"
    )
    highest = others.sort(-pl.col("tokens") / pl.col("total"), "language").unique("unit", keep="first")
    return highest.filter(pl.col("language").is_in(related))["unit"]


def _draw(pool: NDArray[np.int64], wanted: NDArray[np.int64], random: np.random.Generator) -> list[int]:
    """Indices of the ascending `pool`: one near to each value in `wanted`, and more until their sum is reached."""
    free, log_pool = np.ones(len(pool), dtype=bool), np.log(pool)
    drawn: list[int] = []
    values, lacking = list(wanted), int(wanted.sum())
    while len(drawn) < len(pool) and (values or lacking > 0):
        value = np.log(values.pop(0) if values else lacking)
        at, reach = int(log_pool.searchsorted(value)), NEAR + len(drawn)
        window = np.arange(max(0, at - reach), min(len(pool), at + reach))
        window = window[free[window]]
        nearest = window[np.abs(log_pool[window] - value).argsort(kind="stable")[:NEAR]]
        chosen = int(nearest[random.integers(len(nearest))])  # four times as fast as `choice`, with the same result
        free[chosen] = False
        drawn.append(chosen)
        lacking -= int(pool[chosen])
    return drawn
