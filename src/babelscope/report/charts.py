"""How all charts look and what they share. Colours come from a theme, so that one chart serves light and dark pages."""

import json
import math
from collections.abc import Iterable
from functools import cache
from typing import Any

import altair as alt
import polars as pl
import polars.selectors as cs
import vl_convert

from babelscope.report.names import labels
from babelscope.report.numbers import plain

# Both ramps run from the page's background to a saturated end, and differ in lightness all along: they read
# without colour. The diverging one is blue-orange, which the common forms of colour blindness tell apart.
_LIGHT = {
    "page": "#ffffff", "text": "#1d2329", "muted": "#59636e", "line": "#d5dae0", "mark": "#1f5fa8", "second": "#8a5a00",
    "ramp": ["#f1f4f7", "#c6d9ee", "#86b1dc", "#3f7fbf", "#0d4385"],
    "diverging": ["#1b4f93", "#5b8dc9", "#b3cdea", "#f3f4f4", "#f7c68d", "#dc8029", "#9c4600"],
}  # fmt: skip
_DARK = {
    "page": "#14181c", "text": "#e4e7ea", "muted": "#a0a9b2", "line": "#3a424b", "mark": "#5a9be0", "second": "#e0a94a",
    "ramp": ["#20272e", "#23415f", "#2f689f", "#5c9bdb", "#b5d8ff"],
    "diverging": ["#a9cdff", "#5f94d3", "#31507a", "#20272e", "#70441c", "#bd7328", "#ffb668"],
}  # fmt: skip


def _theme(colours: dict[str, Any], font: str) -> dict[str, Any]:
    text, muted = colours["text"], colours["muted"]
    labels = {"labelColor": text, "titleColor": muted, "titleFontSize": 12, "titleFontWeight": "normal"}
    figure = {"fontSize": 12}
    return {
        "background": "transparent", "font": font, "view": {"stroke": None},
        "range": {"ramp": colours["ramp"], "heatmap": colours["ramp"], "diverging": colours["diverging"]},
        "text": {"color": text}, "title": {"color": text, "fontSize": 12, "fontWeight": "normal"},
        "axis": labels | {"domain": False, "ticks": False, "gridColor": colours["line"], "labelFontSize": 12,
                          "labelPadding": 6, "titlePadding": 8},
        "legend": labels | {"labelFontSize": 11, "orient": "bottom", "direction": "horizontal", "gradientLength": 260,
                            "gradientThickness": 10, "titleLimit": 400},
        # `color`, not `fill` or `stroke`: Vega-Lite's own defaults for a mark would win over those.
        "rule": {"color": text},
        "style": {
            "frame": {"stroke": text},
            "value": figure, "largest": figure | {"fontWeight": "bold"}, "nothing": figure | {"color": muted},
            "halo": figure | {"stroke": colours["page"], "strokeWidth": 3, "strokeJoin": "round"},
            "area": {"color": colours["mark"], "fillOpacity": 0.18}, "own": {"color": colours["mark"]},
            "others": {"color": colours["second"], "opacity": 1}, "random": {"color": text, "opacity": 1},
        },
    }  # fmt: skip


THEMES = {"light": _theme(_LIGHT, "system-ui, sans-serif"), "dark": _theme(_DARK, "system-ui, sans-serif")}
# What a downloaded picture looks like: the light theme on white.
PRINT = _theme(_LIGHT, "system-ui, sans-serif") | {"background": "#ffffff", "padding": 12}
SIGNED = "+.5f"


def data(frame: pl.DataFrame) -> Any:
    """The rows of `frame` for a chart; NaN and infinity become null, since JSON has no such numbers."""
    finite = frame.with_columns(cs.float().fill_nan(None).replace([math.inf, -math.inf], None))
    return alt.Data(values=finite.to_dicts())


def written(frame: pl.DataFrame, decimals: int) -> pl.DataFrame:
    """`frame` with `text`, the value as a cell shows it."""
    return frame.with_columns(pl.Series("text", [plain(v, decimals) for v in frame["value"]], dtype=pl.String))


def tips(*fields: str | tuple[str, ...]) -> list[alt.Tooltip]:
    """What a tooltip shows: fields with their types, each with a title and a format if it needs them."""
    parts = ((field,) if isinstance(field, str) else field for field in fields)
    return [alt.Tooltip(**dict(zip(("shorthand", "title", "format"), part, strict=False))) for part in parts]


def ends(form: str = SIGNED) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The ends of a 95 % interval for `tips`."""
    return ("low:Q", "95 % from", form), ("high:Q", "95 % to", form)


def languages_axis(languages: Iterable[str], **axis: Any) -> alt.Axis:
    """An axis of languages, with their names beside their codes."""
    return alt.Axis(labelExpr=labels(languages), labelLimit=220, **axis)


def by_language(frame: pl.DataFrame, *fields: str | tuple[str, ...]) -> alt.Chart:
    """A chart with one row per language, in the order of `frame`; the tooltip has the `fields` (see `tips`), too."""
    languages = frame["language"].unique(maintain_order=True).to_list()
    return alt.Chart(data(frame)).encode(
        y=alt.Y("language:N", sort=languages, title=None, axis=languages_axis(languages)),
        tooltip=tips("language:N", *fields),
    )


def curve(base: alt.Chart, key: str, style: str, shape: str, **y: Any) -> list[alt.Chart]:
    """A line through points over the x of `base`; `y`: options of its axis."""
    marks = base.encode(y=alt.Y(f"{key}:Q", **y))
    points = marks.mark_point(style=style, shape=shape, size=44, filled=True, opacity=1)
    return [marks.mark_line(style=style, strokeWidth=2), points]


def legend(*entries: tuple[str, str, str]) -> alt.LayerChart:
    """A legend as a chart of its own, one row: (style, shape, text) of each mark, as the marks are drawn.

    Vega-Lite's own legends need one scale for all marks, whereas the charts here take colours from the theme's styles.
    """
    width = [34 + 7 * len(text) for _, _, text in entries]
    starts = [sum(width[:place]) for place in range(len(entries))]
    rows = [{"x": 8 + start, "text": text} for start, (_, _, text) in zip(starts, entries, strict=True)]
    layers = []
    for row, (style, shape, _) in zip(rows, entries, strict=True):
        base = alt.Chart(alt.Data(values=[row])).encode(
            x=alt.X("x:Q", axis=None, scale=alt.Scale(domain=[0, sum(width)]))
        )
        mark = base.mark_point(style=style, shape=shape, filled=True, size=56, opacity=1)
        layers += [mark, base.mark_text(align="left", dx=14, fontSize=12, aria=False).encode(text="text:N")]
    return alt.layer(*layers).properties(width=sum(width), height=18)


def bands(name: str, order: pl.Series, **axis: Any) -> alt.X:
    """A horizontal axis with one band per value, as the cells of a heat map above it have it."""
    return alt.X(f"{name}:O", sort=order.to_list(), axis=alt.Axis(labelAngle=0, **axis), scale=alt.Scale(type="band"))


def ramp(frame: pl.DataFrame, zero: bool = True) -> alt.Scale:
    """The colours of `value`, from zero or from the least value. A grid of zeros would have no range of its own."""
    return alt.Scale(range="ramp", zero=zero) if frame["value"].max() else alt.Scale(range="ramp", domain=[0, 1])


def ink(name: str) -> Any:
    """Black or white on a cell of the layer `name`, whichever contrasts more (they meet at a luminance of 0.179)."""
    luminance = f"isValid(datum.value) && luminance(scale('{name}_color', datum.value))"
    return {"condition": [{"test": f"{luminance} < 0.179", "value": "#ffffff"},
                          {"test": f"{luminance} >= 0.179", "value": "#111417"}]}  # fmt: skip


def cells(base: alt.Chart, name: str, scale: alt.Scale, text: str = "text:N") -> tuple[alt.Chart, alt.Chart]:
    """Cells coloured by `value`, and a text in each, to be the first layers of a chart called `name`."""
    colours = base.mark_rect().encode(color=alt.Color("value:Q", scale=scale, legend=None))
    return colours, base.mark_text(style="value", aria=False).encode(text=text, color=ink(name))


def heat_map(
    frame: pl.DataFrame, *, name: str, title: str, decimals: int, description: str, zero: bool = True
) -> alt.LayerChart:  # fmt: skip
    """Languages x layers with the values written into the cells.

    `frame` has `language`, `layer` (a label), `value` (null leaves a cell empty), `hookpoint` and perhaps `low`,
    `high`, `others` and `href` (what a click on the cell opens). `name` is unique within a picture, `title` says what
    the value is, with its unit, and `description` is the text alternative. The colours start at `zero`, or at the
    smallest value.
    """
    form = f",.{decimals + 2}f" if decimals else ","
    shown: list[str | tuple[str, ...]] = ["language:N", "hookpoint:N", ("value:Q", title, form)]
    shown += ends(form) if {"low", "high"} <= set(frame.columns) else ()
    if "others" in frame.columns:
        shown.append(("others:Q", "others, mean", form))
    columns, languages = (frame[key].unique(maintain_order=True).to_list() for key in ("layer", "language"))
    base = alt.Chart(data(written(frame, decimals))).encode(
        x=alt.X("layer:O", sort=columns, axis=alt.Axis(title="layer", orient="top", labelAngle=0)),
        y=alt.Y("language:N", sort=languages, title=None, axis=languages_axis(languages)),
        tooltip=tips(*shown),
    )
    if "href" in frame.columns:
        base = base.encode(href="href:N")
    result = alt.layer(*cells(base, name, ramp(frame, zero)), name=name, description=description)
    return result.properties(width=alt.Step(column_width(len(columns))), height=alt.Step(26))


def column_width(columns: int) -> int:
    """The width of a column of a heat map in pixels: few columns are wide, so that the chart fills its place."""
    return max(44, min(84, 500 // max(1, columns)))


def beside(*charts: Any, description: Any = alt.Undefined) -> alt.HConcatChart:
    """Charts side by side. Each keeps a colour scale of its own name, which the ink of the figures asks for."""
    return alt.hconcat(*charts, spacing=28, description=description).resolve_scale(color="independent")


def below(*charts: Any, description: Any = alt.Undefined) -> alt.VConcatChart:
    """Charts below each other, as `beside` has them side by side."""
    return alt.vconcat(*charts, spacing=14, description=description).resolve_scale(color="independent")


def png(chart: Any) -> bytes:
    """The chart as a PNG on white, twice the size for dense screens, in a font that vl-convert brings along."""
    theme = _theme(_LIGHT, "Liberation Sans") | {"background": "#ffffff", "padding": 12}
    image: bytes = vl_convert.vegalite_to_png(json.dumps(chart.to_dict()), config=theme, scale=2)
    return image


@cache
def javascript() -> str:
    """Vega, Vega-Lite and vega-embed as one script (an ES module) that fetches nothing."""
    bundle: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    # Inside a string of the script this would end the HTML element that holds it.
    return bundle.replace("</script", "<\\/script")
