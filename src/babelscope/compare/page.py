"""`babelscope compare REV1 REV2`: two states of the repository as one HTML page that needs nothing else."""

import base64
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import altair as alt
import polars as pl
import vl_convert

from babelscope.compare.figures import Block, Pair, Value, apart, blocks, changed
from babelscope.compare.states import State, read
from babelscope.config.values import model_title
from babelscope.core.files import write_atomically
from babelscope.report import charts
from babelscope.report.assets import asset, rendered
from babelscope.report.names import called
from babelscope.report.numbers import NONE, percent, plain
from babelscope.report.parts import Table

# The most important figures: their name, file of metrics/, key, decimals, and whether they are shares.
_TILES: tuple[tuple[str, str, str, int, bool], ...] = (
    ("features", "score", "features", 0, False),
    ("effective languages of a feature, median", "score", "effective_languages_median", 2, False),
    ("mean ΔNLL of the language itself, nats/token", "ablate", "own", 3, False),
    ("mean absolute ΔNLL of the others, nats/token", "ablate", "others_abs", 4, False),
    ("languages above the control, after Holm’s correction", "ablate", "languages_above_control_holm", 0, False),
    ("held-out texts whose language the features identify", "identify", "accuracy/sae-count/units", 2, True),
    ("language features matched in another seed", "stability", "features_matched_share", 1, True),
    ("steering: harmonic mean of the best vectors", "steer", "best_harmonic", 2, False),
)


def main(first: str, second: str, html: Path) -> None:
    """Write the page, and print where it is to the standard output."""
    root = Path()
    content = build(read(first, root), read(second, root))
    write_atomically(html, lambda path: path.write_text(content, encoding="utf-8"))
    sys.stdout.write(f"{html}\n")


def build(first: State, second: State) -> str:
    """The page. Charts are pictures in it, so that it has no scripts; the same states give the same bytes."""
    names, both = labels(first, second), (first, second)
    head = ["key", *names]
    return rendered(
        asset("compare.html.j2", "compare"),
        style=asset("page.css"), names=names,
        states=[(name, model_title(one.params.get("model", {})), one.commit[:10] or "not committed")
                for name, one in zip(names, both, strict=True)],
        tiles=[(tile[0], tuple(_tile(one, tile) for one in both)) for tile in _TILES],
        params=Table("Settings of params.yaml that differ", head, changed(*both), labels=3),
        blocks=[(block, verdict(block, names), picture(block, names), table(block, names)) for block in blocks(*both)],
    )  # fmt: skip


def labels(first: State, second: State) -> list[str]:
    """The names of the two states; with their commits if the names are the same."""
    if first.name != second.name:
        return [first.name, second.name]
    return [f"{first.name} (first)", f"{second.name} (second)"]


def _tile(state: State, tile: tuple[str, str, str, int, bool]) -> str:
    _, stage, key, decimals, share = tile
    value = state.figure(stage, key)
    return percent(value, decimals) if share else plain(value, decimals)


def verdict(block: Block, names: Sequence[str]) -> str:
    """In one sentence, how the two states differ in a block."""
    both = [(one.value, other.value) for one, other in block.rows.values() if one is not None and other is not None]
    if not both:
        return "No row has a figure in both states."
    higher = sum(other > one for one, other in both)
    lower = sum(other < one for one, other in both)
    text = f"{names[1]} is higher than {names[0]} in {higher} of {len(both)} rows and lower in {lower}"
    known = [apart(pair) for pair in block.rows.values() if apart(pair) is not None]
    return text + (f"; the intervals do not overlap in {sum(map(bool, known))} of {len(known)}." if known else ".")


def table(block: Block, names: Sequence[str]) -> Table:
    """A row per language or hookpoint: both figures with intervals, and their difference."""
    rows = []
    for name, pair in block.rows.items():
        one, other = pair
        difference = other.value - one.value if one is not None and other is not None else None
        separate = apart(pair)
        rows.append([
            called(name), *(_cell(value, block.decimals) for value in pair),
            plain(difference, block.decimals, sign=True),
            NONE if separate is None else "yes" if separate else "no",
        ])  # fmt: skip
    head = ["", *names, "difference", "intervals apart"]
    return Table(block.unit, head, rows)


def _cell(value: Value | None, decimals: int) -> str:
    if value is None:
        return NONE
    interval = f" [{plain(value.low, decimals)}, {plain(value.high, decimals)}]" if value.low is not None else ""
    return plain(value.value, decimals) + interval


def long(rows: Mapping[str, Pair], names: Sequence[str], at: Mapping[str, float] | None) -> pl.DataFrame:
    """The figures as rows of a chart: `row`, `state`, `value`, `low`, `high`, and `depth` if `at` is known."""
    found = [
        {"row": row, "state": name, "value": value.value, "low": value.low, "high": value.high}
        | ({} if at is None else {"depth": at[row]})
        for row, pair in rows.items()
        for name, value in zip(names, pair, strict=True)
        if value is not None
    ]
    return pl.DataFrame(found, infer_schema_length=None, schema_overrides={"low": pl.Float64, "high": pl.Float64})


def chart(block: Block, names: Sequence[str]) -> Any:
    """Both states as points with intervals, one row below the other; over depth, as two lines."""
    frame = long(block.rows, names, block.at)
    colour = alt.Color("state:N", sort=list(names), title=None, scale=alt.Scale(domain=list(names), range="category"))
    base = alt.Chart(charts.data(frame))
    if block.at is not None:
        line = base.encode(x=alt.X("depth:Q", title="depth", scale=alt.Scale(zero=False)),
                           y=alt.Y("value:Q", title=None, scale=alt.Scale(zero=False)), color=colour)  # fmt: skip
        return alt.layer(line.mark_line(), line.mark_point(filled=True, size=50)).properties(width=680, height=240)
    y = alt.Y("row:N", sort=list(block.rows), title=None, axis=charts.languages_axis(block.rows))
    shared = base.encode(y=y, yOffset=alt.YOffset("state:N", sort=list(names)), color=colour)
    points = shared.mark_point(filled=True, size=50, opacity=1).encode(x=alt.X("value:Q", title=block.unit))
    spans = shared.mark_rule(strokeWidth=2).encode(x="low:Q", x2="high:Q")
    return alt.layer(spans, points).properties(width=680, height=alt.Step(13))


def picture(block: Block, names: Sequence[str]) -> dict[str, str]:
    """The chart as SVG for light and for dark pages, as addresses that hold the pictures."""
    spec = json.dumps(chart(block, names).to_dict())
    found = {}
    for name, theme in charts.THEMES.items():
        colours = [theme["style"][key]["color"] for key in ("own", "others")]
        # The padding is for the reader's font, which may be wider.
        config = theme | {"font": "Liberation Sans", "padding": 16, "range": {**theme["range"], "category": colours}}
        svg = vl_convert.vegalite_to_svg(spec, config=config)
        found[name] = "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
    return found
