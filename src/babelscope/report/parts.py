"""What every section of the page is given, and what it is made of: prose, charts and tables."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import polars as pl
from markupsafe import Markup

from babelscope.core.errors import UserError
from babelscope.models.names import parts_of
from babelscope.report.numbers import NONE, plain

COLUMNS = {
    "features": "kind hookpoint layer unit language probability entropy rank",
    "nll": "method kind ablated control evaluated nll tokens delta low high",
    "by_layer": "method kind ablated control evaluated nll tokens delta low high hookpoint",
    "control": "method language excess excess_low excess_high contrast contrast_low contrast_high",
    "curve": "language top features own others control",
    "confusion": "method normalize language predicted texts",
    "generations": "method language slot decoding prompt text predicted",
    "similarity": "language other units jaccard",
    "sharing": "hookpoint layer language other groups translations random typology",
    "switching": "language other groups cost effect effect_low effect_high switched stayed host alone",
    "switch_positions": "language other position host intruder",
    "baselines": "method trained_on evaluated_on languages texts accuracy low high difference difference_low "
    "difference_high",
    "script": "hookpoint unit language script_bound",
}


@dataclass(frozen=True)
class ReportInputs:
    """Everything that the page shows.

    `params` are the sections of params.yaml that decide the results; their `languages` and `hookpoints` set the order
    of rows and columns. `metrics` is metrics/<name>.json by name (any key may be missing), `files` the MD5 of the input
    files by path, `versions` the version by package, `bytes_per_token` the UTF-8 bytes per token of a language's
    held-out text (a language may be missing). The frames are the pipeline's tables of the same names, as
    docs/contracts.md describes them; a language without features has no row, or one whose unit is null.

    Raises
    ------
    UserError: a frame lacks a column.
    """

    params: Mapping[str, Any]
    features: pl.DataFrame
    nll: pl.DataFrame
    by_layer: pl.DataFrame | None
    metrics: Mapping[str, Mapping[str, Any]]
    files: Mapping[str, str]
    versions: Mapping[str, str]
    control: pl.DataFrame | None = None
    curve: pl.DataFrame | None = None
    confusion: pl.DataFrame | None = None
    generations: pl.DataFrame | None = None
    similarity: pl.DataFrame | None = None
    sharing: pl.DataFrame | None = None
    switching: pl.DataFrame | None = None
    switch_positions: pl.DataFrame | None = None
    baselines: pl.DataFrame | None = None
    script: pl.DataFrame | None = None
    bytes_per_token: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, columns in COLUMNS.items():
            frame = getattr(self, name)
            missing = [] if frame is None else [key for key in columns.split() if key not in frame.columns]
            if missing:
                columns = ", ".join(frame.columns)
                raise UserError(f"{name}.parquet: no column {', '.join(missing)}; the columns are {columns}")

    @property
    def languages(self) -> list[str]:
        """The languages, in the order of params.yaml."""
        return list(self.params["languages"])

    @property
    def hookpoints(self) -> list[str]:
        """The hookpoints, in the order of params.yaml."""
        return list(self.params["hookpoints"])

    @property
    def members(self) -> int:
        """To how many languages every feature belongs."""
        return int(self.params.get("score", {}).get("members", 1))

    def order(self, column: str) -> pl.Expr:
        """A column of languages, as what sorts in the order of params.yaml."""
        return pl.col(column).cast(pl.Enum(self.languages))

    def figure(self, name: str, key: str) -> Any:
        """The figure `key` of `metrics/<name>.json`, or None if there is none."""
        return self.metrics.get(name, {}).get(key)

    def each(self, name: str, key: str, of: Iterable[str] | None = None) -> list[Any]:
        """The figures `<key>/<one>` of `metrics/<name>.json`, by default one for each language."""
        return [self.figure(name, f"{key}/{one}") for one in (self.languages if of is None else of)]

    def grid(self) -> pl.DataFrame:
        """Every pair of `language` and `hookpoint` in the order of params.yaml, `layer` (label) and `href` (link)."""
        labels = layer_labels(self.hookpoints)
        columns = pl.DataFrame({"hookpoint": self.hookpoints, "layer": list(labels.values())})
        grid = pl.DataFrame({"language": self.languages}).join(columns, how="cross", maintain_order="left_right")
        links = [browser_link(*pair) for pair in grid.select("language", "hookpoint").rows()]
        return grid.with_columns(href=pl.Series(links, dtype=pl.String))


def layer_labels(hookpoints: list[str]) -> dict[str, str]:
    """Short names for an axis: the number of the layer if no two hookpoints share it, else the whole name."""
    found = {name: parts_of(name) for name in hookpoints}
    numbers = {name: str(parts[0]) for name, parts in found.items() if parts is not None}
    return numbers if len(set(numbers.values())) == len(hookpoints) else {name: name for name in hookpoints}


@dataclass(frozen=True)
class Table:
    """A table of text. Its first `labels` columns are names. It opens by a link that says `folded`, or is open."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    labels: int = 1
    folded: str = ""

    @classmethod
    def of(cls, caption: str, columns: Mapping[str, Any], labels: int = 1, folded: str = "") -> "Table":
        """A table from its columns by their headings."""
        rows = [list(row) for row in zip(*columns.values(), strict=True)]
        return cls(caption, list(columns), rows, labels, folded)

    @classmethod
    def grid(cls, caption: str, frame: pl.DataFrame, decimals: int, folded: str) -> "Table":
        """`value` of a frame as `ReportInputs.grid` has its rows: one row per language, one column per hookpoint."""
        groups = frame.group_by("hookpoint", maintain_order=True)
        columns: dict[str, Iterable[str]] = {"language": frame["language"].unique(maintain_order=True)}
        columns |= {str(name): figures(rows["value"], decimals) for (name,), rows in groups}
        return cls.of(caption, columns, folded=folded)


Block = Markup | Table


@dataclass(frozen=True)
class Picture:
    """A chart (an Altair chart) with the text, and perhaps tables, beside it, or below it if it is `wide`."""

    name: str
    label: str
    chart: Any
    caption: Sequence[Block]
    wide: bool = False


@dataclass(frozen=True)
class Section:
    """A part of the page; `id` is its anchor, `short` its entry in the list of sections."""

    id: str
    short: str
    title: str
    blocks: Sequence[Block | Picture]


def prose(text: str, **values: object) -> Markup:
    """HTML written here, in which the `{name}`s are replaced by `values`: those are escaped."""
    return Markup(text).format(**values)  # noqa: S704


def how_to_read(text: str, **values: object) -> Markup:
    """`prose` that explains a figure, folded, so that what the figure shows comes first."""
    return Markup('<details class="how"><summary>How to read this figure</summary>{}</details>').format(
        prose(text, **values)
    )


def browser_link(language: str | None = None, hookpoint: str | None = None, **others: str) -> str:
    """The address of the feature browser's page on a language, a hookpoint, or both."""
    state = {"language": language, "hookpoint": hookpoint, **others}
    return "features.html#" + "&".join(f"{key}={quote(value, safe='')}" for key, value in state.items() if value)


def bits_per_byte(inputs: "ReportInputs", language: str, nats_per_token: float | None) -> float | None:
    """nats/token in bits/byte, which can be compared between languages whose tokens differ in length."""
    size = inputs.bytes_per_token.get(language)
    return None if size is None or nats_per_token is None else nats_per_token / math.log(2) / size


def figures(values: Iterable[Any], decimals: int = 0, *, sign: bool = False) -> list[str]:
    """A column of a table."""
    return [plain(value, decimals, sign=sign) for value in values]


def intervals(lows: Iterable[float | None], highs: Iterable[float | None]) -> list[str]:
    """A column of confidence intervals, or of ranges, in nats/token."""
    ends = zip(figures(lows, 4, sign=True), figures(highs, 4, sign=True), strict=True)
    return [NONE if NONE in pair else " to ".join(pair) for pair in ends]
