"""The figures of two states as pairs with 95 % intervals."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import polars as pl

from babelscope.compare.states import State
from babelscope.config.schema import primary_method
from babelscope.models.names import layer_of
from babelscope.report.verdict import wilson


class Value(NamedTuple):
    """A figure and its 95 % interval (None: not known, or no sample)."""

    value: float
    low: float | None = None
    high: float | None = None


Pair = tuple[Value | None, Value | None]


@dataclass(frozen=True)
class Block:
    """A part of the page: figures by language or by another name, of both states.

    Attributes
    ----------
    rows: by name, the figure of either state.
    unit: what a figure is, for the axis and the heading of the table.
    note: how it and its interval were computed.
    at: the place of every row on an axis (relative depth), or None if the rows are names.
    """

    id: str
    title: str
    unit: str
    note: str
    rows: dict[str, Pair]
    decimals: int = 3
    at: dict[str, float] | None = None

    @property
    def has_intervals(self) -> bool:
        """Whether a figure has an interval."""
        return any(value is not None and value.low is not None for pair in self.rows.values() for value in pair)


def apart(pair: Pair) -> bool | None:
    """Whether the two intervals do not overlap; None if one is not known."""
    first, second = pair
    if first is None or second is None or None in (*first, *second):
        return None
    return first.low > second.high or second.low > first.high  # type: ignore[operator]


def _counted(state: State, stage: str, key: str, count: float | None) -> Value | None:
    share = state.figure(stage, key)
    if share is None or not math.isfinite(share):
        return None
    return Value(share, *(wilson(share, int(count)) if count and 0 <= share <= 1 else ()))


def _steered(state: State, method: str) -> Value | None:
    keys = (f"harmonic{end}/{method}" for end in ("", "_low", "_high"))
    value, low, high = (state.figure("steer", key) for key in keys)
    return None if value is None else Value(value, low, high)


def _plain(state: State, stage: str, key: str) -> Value | None:
    value = state.figure(stage, key)
    return None if value is None else Value(float(value))


def own_effects(state: State) -> dict[str, Value]:
    """By language, the change of the own loss without its features, with the interval from the ablation's table."""
    if state.nll is None:
        prefix = "dnll_own/"
        own = state.metrics.get("ablate", {})
        return {key.removeprefix(prefix): Value(value) for key, value in own.items() if key.startswith(prefix)}
    is_own = (pl.col("ablated") == pl.col("evaluated")) & pl.col("control").is_null()
    method = state.figure("ablate", "primary_method") or primary_method(state.nll["method"].unique().sort().to_list())
    rows = state.nll.filter(is_own, method=method)
    return {name: Value(*values) for name, *values in rows.select("ablated", "delta", "low", "high").iter_rows()}


def blocks(first: State, second: State) -> list[Block]:
    """Every part for which one of the two states has figures."""
    states = (first, second)
    languages = dict.fromkeys(name for state in states for name in state.params.get("languages", []))

    def by_language(stage: str, key: str, count: str | None = None) -> dict[str, Pair]:
        def one(state: State, name: str) -> Value | None:
            return _counted(state, stage, f"{key}/{name}", state.figure(stage, f"{count}/{name}") if count else None)

        return {name: (one(first, name), one(second, name)) for name in languages}

    effects = [own_effects(state) for state in states]

    def named(stage: str, prefix: str) -> dict[str, None]:
        keys = (key for state in states for key in state.metrics.get(stage, {}) if key.startswith(prefix))
        return dict.fromkeys(key.removeprefix(prefix) for key in keys)

    steering, methods = named("steer", "harmonic/"), named("identify", "accuracy/")
    texts = [state.figure("identify", "texts") for state in states]
    found = [
        Block("features", "Features per language", "features", "A count of the selected latents; it has no interval.",
              by_language("score", "features"), 0),
        Block("specificity", "How specific the features are", "effective languages, median",
              "The exponential of the entropy of a feature's firing rates: 1 means that it fires on one language only. "
              "It has no interval.", by_language("score", "effective_languages_median"), 2),
        Block("ablation", "What removing a language's features does to it", "ΔNLL of the language, nats/token",
              "Bootstrap intervals over the held-out texts, from data/ablation/nll.parquet of either state.",
              {name: (effects[0].get(name), effects[1].get(name)) for name in languages}),
        Block("identification", "Identification", "accuracy on held-out texts",
              "Score intervals (Wilson) over the texts. The method is followed by its normalisation.",
              {name: _both(_counted(state, "identify", f"accuracy/{name}", count)
                           for state, count in zip(states, texts, strict=True)) for name in methods}, 4),
        Block("stability", "Features found again with another seed", "share of the features",
              "One-to-one matching, cosine of at least stability.cosine in decoder and encoder. Score intervals "
              "(Wilson) over the features.", by_language("stability", "features_matched_share", "stability_features")),
        Block("sets", "What a language's set of features writes, with another seed", "write cosine",
              "Cosine of what the two sets write on average. It has no interval.",
              by_language("stability", "write_cosine")),
        Block("steering", "Steering by method", "harmonic mean of forcing and relevance",
              "Bootstrap intervals over the prompts.",
              {name: _both(_steered(state, name) for state in states) for name in steering}, 2),
        *by_depth(states),
    ]  # fmt: skip
    return [block for block in found if any(pair != (None, None) for pair in block.rows.values())]


def _both(values: Iterable[Value | None]) -> Pair:
    one, other = values
    return one, other


def depths(state: State) -> dict[str, float]:
    """The place of every hookpoint: layer / layers, or the layer if the state does not say how many there are."""
    layers = state.figure("extract", "layers")
    return {name: layer_of(name) / layers if layers else layer_of(name) for name in state.params.get("hookpoints", [])}


def by_depth(states: Sequence[State]) -> list[Block]:
    """Figures of every hookpoint over relative depth, so that models with different numbers of layers compare."""
    places = [depths(state) for state in states]
    relative = all(state.figure("extract", "layers") for state in states)
    axis = "relative depth (layer / layers)" if relative else "layer (a state does not record the number of layers)"
    wanted = {
        "own_alone": ("ablate", "own_alone/{at}", "ΔNLL of the language, one hookpoint alone, nats/token"),
        "fvu": ("train.{at}", "fvu", "FVU on held-out text"),
        "recovered": ("quality", "loss_recovered/{at}", "loss recovered"),
    }
    found = []
    for key, (stage, figure, unit) in wanted.items():
        rows: dict[str, Pair] = {}
        at: dict[str, float] = {}
        for number, (state, depth) in enumerate(zip(states, places, strict=True)):
            for name, place in depth.items():
                value = _plain(state, stage.format(at=name), figure.format(at=name))
                row = f"{place:.2f} {name}" if relative else name
                before = rows.get(row, (None, None))
                rows[row] = (value, before[1]) if number == 0 else (before[0], value)
                at[row] = place
        order = sorted(rows, key=lambda row: (at[row], row))
        note = f"Mean over the languages at each hookpoint; the axis is the {axis}. It has no interval."
        found.append(Block(key, f"By depth: {unit}", unit, note, {row: rows[row] for row in order}, 3, at))
    return found


def changed(first: State, second: State) -> list[tuple[str, str, str]]:
    """The params that differ: key, value in the first state, value in the second."""
    flat = [_flat("", state.params) for state in (first, second)]
    keys = sorted({key for one in flat for key in one})
    shown = [(key, *(str(one[key]) if key in one else "–" for one in flat)) for key in keys]
    return [(key, one, other) for key, one, other in shown if one != other]


def _flat(prefix: str, content: object) -> dict[str, object]:
    if not isinstance(content, dict):
        return {prefix: ", ".join(map(str, content)) if isinstance(content, list) else content}
    return {key: value for name, part in content.items()
            for key, value in _flat(f"{prefix}.{name}".lstrip("."), part).items()}  # fmt: skip
