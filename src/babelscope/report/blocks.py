"""What a section of the page is made of: prose, charts and tables."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl
from markupsafe import Markup

from babelscope.report.numbers import NONE, plain


@dataclass(frozen=True)
class Table:
    """A table of text; its first `labels` columns are names, the others figures. `folded`: the link that opens it."""

    caption: str
    head: list[str]
    rows: list[list[str]]
    labels: int = 1
    folded: str = ""


@dataclass(frozen=True)
class Picture:
    """A chart (an Altair chart) with the text, and perhaps tables, beside it, or below it if it is `wide`."""

    name: str
    label: str
    chart: Any
    caption: Sequence[Markup | Table]
    wide: bool = False


@dataclass(frozen=True)
class Section:
    """A part of the page; `id` is its anchor, `short` its entry in the list of sections."""

    id: str
    short: str
    title: str
    blocks: Sequence[Markup | Table | Picture]


def prose(text: str, **values: object) -> Markup:
    """HTML written here, in which the `{name}`s are replaced by `values`: those are escaped."""
    return Markup(text).format(**values)  # noqa: S704


def by_hookpoint(frame: pl.DataFrame, decimals: int) -> list[list[str]]:
    """The `value`s of a grid of `language` and hookpoint as the rows of a table, one per language."""
    rows: dict[str, list[str]] = {}
    for language, value in frame.select("language", "value").rows():
        rows.setdefault(language, [language]).append(plain(value, decimals))
    return list(rows.values())


def interval(low: float | None, high: float | None) -> str:
    """A confidence interval, or a range, in nats/token."""
    return NONE if low is None or high is None else f"{plain(low, 4, sign=True)} to {plain(high, 4, sign=True)}"
