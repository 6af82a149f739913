"""The feature browser: every feature with all that is known about it, as one HTML file that needs nothing else."""

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import polars as pl

from babelscope.core.errors import UserError
from babelscope.report.assets import asset, embedded, rendered, source_hash
from babelscope.report.names import called
from babelscope.report.numbers import plain

_KEY = ("hookpoint", "unit")
COLUMNS = {
    "features": (*_KEY, "kind", "languages", "entropy", "largest", "delta", "delta_low", "delta_high", "delta_tokens",
                 "delta_texts"),
    "probabilities": (*_KEY, "language", "probability"),
    "histograms": (*_KEY, "bin", "own", "other"),
    "texts": ("text_id", "language", "pieces"),
    "examples": (*_KEY, "side", "place", "text_id", "activations"),
    "tokens": (*_KEY, "side", "place", "token", "logit"),
    "neighbours": (*_KEY, "place", "neighbour", "cosine"),
}  # fmt: skip


@dataclass(frozen=True)
class BrowserInputs:
    """Everything that the page shows; the languages and hookpoints are in the order of params.yaml.

    `frames` is data/browse/<name>.parquet by name, at least those of `COLUMNS`, and perhaps `explanations`,
    `stability` (data/stability/features.parquet), `ranking` (data/ablation/ranking.parquet) and `script`
    (data/script/features.parquet). `selected`: how many features were selected, of which the browser may show a part
    (0: not known). `about`, `cells`: see `babelscope.report.about`.
    """

    languages: Sequence[str]
    hookpoints: Sequence[str]
    model: str
    frames: Mapping[str, pl.DataFrame]
    selected: int = 0
    about: Mapping[str, Sequence[tuple[str, str]]] = field(default_factory=dict)
    cells: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, columns in COLUMNS.items():
            missing = [column for column in columns if column not in self.frames[name].columns]
            if missing:
                raise UserError(f"data/browse/{name}.parquet: no column {', '.join(missing)}; dvc repro browse")


def content(inputs: BrowserInputs) -> dict[str, Any]:
    """What the page's script reads, as JSON can hold it.

    Returns
    -------
    `languages`, `hookpoints`, `tokens`: names, to which numbers below refer. `texts`: `language`, `pieces`, `rtl`.
    `features`, by hookpoint and unit: `at` (hookpoint), `unit`, `of` (its languages), `entropy` (nats), `rates` (one
    per language), `largest` (activation), `histogram` (own languages, others), `own`, `other`, `sample` (texts: number,
    then piece and activation of every piece on which it fires), `promoted`, `suppressed` (token, logit), `near`
    (neighbour's unit, cosine), `delta` (nats/token, or None), `range` (its 95 % interval, or None), `on` (how many
    texts and tokens it was measured on), and, if known, `matched` (whether another seed has it), `causal`
    (estimated dNLL of its language and of the others without it, rank), `script` (whether it is script-bound, or None,
    and its rate on romanised texts relative to that on the texts as they are) and `said` (the explanation, its
    detection and fuzzing scores). `names`: of the languages. `about`, `cells`: as in the inputs.
    """
    frames = inputs.frames
    texts = frames["texts"].select("text_id", "language", "pieces").rows()
    tokens = frames["tokens"]["token"].unique().sort().to_list()
    code, hookpoint_number, text_number, token_number = (
        {name: number for number, name in enumerate(names)}
        for names in (inputs.languages, inputs.hookpoints, [row[0] for row in texts], tokens)
    )

    features: dict[tuple[str, int], dict[str, Any]] = {}
    order = pl.col("hookpoint").cast(pl.Enum(list(inputs.hookpoints)))
    for row in frames["features"].sort(order, "unit").iter_rows(named=True):
        features[row["hookpoint"], row["unit"]] = {
            "at": hookpoint_number[row["hookpoint"]], "unit": row["unit"],
            "of": [code[name] for name in row["languages"]], "entropy": round(row["entropy"], 4),
            "largest": _digits(row["largest"]), "rates": [0.0] * len(code), "histogram": [[], []],
            "own": [], "other": [], "sample": [], "promoted": [], "suppressed": [], "near": [],
            "delta": None if row["delta"] is None else _digits(row["delta"]),
            "range": None if row["delta_low"] is None else [_digits(row["delta_low"]), _digits(row["delta_high"])],
            "on": [row["delta_texts"], row["delta_tokens"]],
        }  # fmt: skip
    for hookpoint, unit, language, rate in _rows(frames, "probabilities"):
        features[hookpoint, unit]["rates"][code[language]] = _digits(rate)
    for hookpoint, unit, _, *sides in _rows(frames, "histograms", "bin"):
        for bars, count in zip(features[hookpoint, unit]["histogram"], sides, strict=True):
            bars.append(count)
    for hookpoint, unit, side, _, text_id, activations in _rows(frames, "examples", "place"):
        fires = [(number, _digits(value)) for number, value in enumerate(activations) if value > 0]
        features[hookpoint, unit][side].append([text_number[text_id], *(part for pair in fires for part in pair)])
    for hookpoint, unit, side, _, token, logit in _rows(frames, "tokens", "place"):
        features[hookpoint, unit][side].append([token_number[token], _digits(logit)])
    for hookpoint, unit, _, neighbour, cosine in _rows(frames, "neighbours", "place"):
        features[hookpoint, unit]["near"].append([neighbour, _digits(cosine)])

    def shown(name: str, *columns: str) -> Iterable[tuple[Any, ...]]:
        """Of a frame that may be missing, the features that are shown, each with some columns."""
        rows = frames[name].select(*_KEY, *columns).iter_rows() if name in frames else ()
        return ((features[row[:2]], *row[2:]) for row in rows if row[:2] in features)

    for feature, matched in shown("stability", "matched"):
        feature["matched"] = matched
    for feature, own, others, rank in shown("ranking", "own", "others", "causal_rank"):
        feature["causal"] = [_digits(own), _digits(others), rank]
    for feature, *said in shown("explanations", "explanation", "detection", "fuzzing"):
        feature["said"] = said
    for feature, bound, kept in shown("script", "script_bound", "kept_romanised"):
        feature["script"] = [bound, None if kept is None else round(kept, 3)]
    return {
        "languages": list(inputs.languages), "hookpoints": list(inputs.hookpoints), "tokens": tokens,
        "texts": [{"language": code[language], "pieces": pieces, "rtl": is_right_to_left("".join(pieces))}
                  for _, language, pieces in texts],
        "features": list(features.values()), "names": [called(name) for name in inputs.languages],
        "about": dict(inputs.about), "cells": dict(inputs.cells),
    }  # fmt: skip


def _rows(frames: Mapping[str, pl.DataFrame], name: str, by: str | None = None) -> Iterable[tuple[Any, ...]]:
    frame = frames[name].select(COLUMNS[name])
    return (frame.sort(by, maintain_order=True) if by else frame).iter_rows()


def _digits(value: float) -> float:
    """Four significant digits; the page does not show more."""
    return float(f"{value:.4g}")


def is_right_to_left(text: str) -> bool:
    """Whether most letters of a text belong to a script that is written from right to left.

    `dir="auto"` would look at the first letter, but many Hebrew sentences begin with a foreign name.
    """
    kinds = [unicodedata.bidirectional(character) for character in text]
    return sum(kind in ("R", "AL") for kind in kinds) > kinds.count("L")


def build(inputs: BrowserInputs) -> str:
    """The feature browser as one HTML page: the same inputs give the same text.

    Nothing is fetched, and a Content-Security-Policy forbids it. The script puts the data into the page as text only.
    """
    script = asset("browser.js")
    kinds = inputs.frames["features"]["kind"]
    specific = int((kinds == "specific").sum())
    return rendered(
        asset("browser.html.j2"),
        policy=source_hash(script), script=script, style=asset("page.css") + asset("browser.css"),
        data=embedded(content(inputs)), model=inputs.model, specific=plain(specific),
        shared=plain(int((kinds == "shared").sum())),
        selected=plain(inputs.selected) if inputs.selected > specific else "",
        languages=[called(name) for name in inputs.languages], codes=inputs.languages, hookpoints=inputs.hookpoints,
    )  # fmt: skip
