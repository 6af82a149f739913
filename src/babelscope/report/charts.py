"""The pictures, as Vega-Lite by Altair. Colours come from a theme, so that one chart serves light and dark pages."""

import json
import math
from functools import cache
from typing import Any

import altair as alt
import polars as pl
import polars.selectors as cs
import vl_convert

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
    return {
        "background": "transparent",
        "font": font,
        "view": {"stroke": None},
        "range": {"ramp": colours["ramp"], "heatmap": colours["ramp"], "diverging": colours["diverging"]},
        "text": {"color": colours["text"]},
        "title": {"color": colours["text"], "fontSize": 12, "fontWeight": "normal"},
        "axis": {
            "labelColor": colours["text"], "titleColor": colours["muted"], "domain": False, "ticks": False,
            "gridColor": colours["line"], "labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal",
            "labelPadding": 6, "titlePadding": 8,
        },
        "legend": {
            "labelColor": colours["text"], "titleColor": colours["muted"], "labelFontSize": 11, "titleFontSize": 12,
            "titleFontWeight": "normal", "orient": "bottom", "direction": "horizontal", "gradientLength": 260,
            "gradientThickness": 10, "titleLimit": 400,
        },
        # `color`, not `fill` or `stroke`: Vega-Lite's own defaults for a mark would win over those.
        "rule": {"color": colours["text"]},
        "style": {
            "frame": {"stroke": colours["text"]},
            "value": {"fontSize": 11.5},
            "largest": {"fontSize": 11.5, "fontWeight": "bold"},
            "nothing": {"fontSize": 11.5, "color": colours["muted"]},
            "halo": {"fontSize": 11.5, "stroke": colours["page"], "strokeWidth": 3, "strokeJoin": "round"},
            "area": {"color": colours["mark"], "fillOpacity": 0.18},
            "own": {"color": colours["mark"]},
            "others": {"color": colours["second"], "opacity": 1},
            "random": {"color": colours["text"], "opacity": 1},
        },
    }  # fmt: skip


THEMES = {"light": _theme(_LIGHT, "system-ui, sans-serif"), "dark": _theme(_DARK, "system-ui, sans-serif")}


def _ink(scale: str, field: str = "value") -> Any:
    """Black or white, whichever contrasts more (WCAG: they meet at a relative luminance of 0.179)."""
    dark_cell = f"isValid(datum.{field}) && luminance(scale('{scale}', datum.{field})) < 0.179"
    light_cell = f"isValid(datum.{field}) && luminance(scale('{scale}', datum.{field})) >= 0.179"
    return {"condition": [{"test": dark_cell, "value": "#ffffff"}, {"test": light_cell, "value": "#111417"}]}


def _data(frame: pl.DataFrame) -> Any:
    """The rows of `frame`; what is not a finite number is null, for JSON knows no other."""
    return alt.Data(
        values=frame.with_columns(cs.float().fill_nan(None).replace([math.inf, -math.inf], None)).to_dicts()
    )


def _written(frame: pl.DataFrame, decimals: int) -> pl.DataFrame:
    """`frame` with `text`, the value as a cell shows it."""
    return frame.with_columns(pl.Series("text", [plain(v, decimals) for v in frame["value"]], dtype=pl.String))


def heat_map(
    frame: pl.DataFrame, *, name: str, title: str, decimals: int, description: str, step: int = 42, zero: bool = True,
    axis: str = "layer",
) -> alt.LayerChart:  # fmt: skip
    """Languages x layers (or another `axis`) with the figures written into the cells.

    Parameters
    ----------
    frame: `language`, `layer` (label; or what `axis` names), `value` and, where known, `hookpoint`, `low` and `high`; a
        null value leaves an empty cell.
    name: prefix of the chart's scales, unique within one picture.
    title: what the value is, with its unit.
    decimals: of the figures in the cells.
    description: the text alternative.
    step: width of a cell in pixels.
    zero: whether the colours start at zero, or at the least value.
    axis: the column on the horizontal axis, and its title.
    """
    form = f",.{decimals + 2}f" if decimals else ","
    interval = [
        alt.Tooltip("low:Q", title="95 % from", format=form), alt.Tooltip("high:Q", title="95 % to", format=form),
    ] if {"low", "high"} <= set(frame.columns) else []  # fmt: skip
    if "others" in frame.columns:
        interval.append(alt.Tooltip("others:Q", title="others, mean", format=form))
    where = "hookpoint" if "hookpoint" in frame.columns else axis
    base = alt.Chart(_data(_written(frame, decimals))).encode(
        x=alt.X(f"{axis}:O", sort=frame[axis].unique(maintain_order=True).to_list(),
                axis=alt.Axis(title=axis, orient="top", labelAngle=0)),
        y=alt.Y("language:N", sort=frame["language"].unique(maintain_order=True).to_list(), title=None),
        tooltip=[alt.Tooltip("language:N"), alt.Tooltip(f"{where}:N"),
                 alt.Tooltip("value:Q", title=title, format=form), *interval],
    )  # fmt: skip
    # Without this a grid of one single value would get an empty domain, and one colour that says nothing.
    top = frame["value"].max()
    scale = alt.Scale(range="ramp", zero=zero) if top else alt.Scale(range="ramp", domain=[0, 1])
    cells = base.mark_rect().encode(color=alt.Color("value:Q", scale=scale, legend=None))
    texts = base.mark_text(style="value", aria=False).encode(text="text:N", color=_ink(f"{name}_color"))
    return alt.layer(cells, texts, name=name, description=description).properties(
        width=alt.Step(step), height=alt.Step(24)
    )


def features_by_layer(frame: pl.DataFrame, step: int = 42) -> alt.VConcatChart:
    """Picture 1: how many features each language has in each layer, and in all languages together.

    Parameters
    ----------
    frame: `language`, `layer`, `hookpoint`, `value` (features), the whole grid.
    step: width of a cell in pixels.
    """
    totals = frame.group_by("layer", "hookpoint", maintain_order=True).agg(pl.col("value").sum())
    order = totals["layer"].to_list()
    text = "Features of each language in each layer; the table below holds the same figures."
    cells = heat_map(frame, name="features", title="features", decimals=0, description=text, step=step)
    base = alt.Chart(_data(totals)).encode(
        x=alt.X("layer:O", sort=order, axis=alt.Axis(title="layer", labelAngle=0), scale=alt.Scale(type="band")),
        y=alt.Y("value:Q", axis=alt.Axis(title="all languages", tickCount=3), scale=alt.Scale(zero=True, nice=True)),
        tooltip=[alt.Tooltip("hookpoint:N"), alt.Tooltip("value:Q", title="features")],
    )
    sums = alt.layer(
        base.mark_area(style="area"),
        base.mark_line(style="own", strokeWidth=2),
        base.mark_point(style="own", size=36, filled=True, opacity=1),
        base.mark_text(style="halo", dy=-11, aria=False).encode(text="value:Q"),
        base.mark_text(style="value", dy=-11, aria=False).encode(text="value:Q"),
    ).properties(width=alt.Step(step), height=90)
    # Each chart keeps a colour scale of its own name, which the ink of the figures asks for.
    return alt.vconcat(cells, sums, spacing=14, description=text).resolve_scale(color="independent")


def own_by_layer(frame: pl.DataFrame, sums: pl.DataFrame, step: int = 42) -> alt.VConcatChart:
    """Own dNLL of each language with one layer ablated alone, and below it own against others over all languages.

    Parameters
    ----------
    frame: as `babelscope.report.data.own_by_layer` returns it.
    sums: the same by hookpoint, as `babelscope.report.data.by_hookpoint` returns it.
    step: width of a cell in pixels.
    """
    text = "Change of NLL with one layer's features removed alone; the tables hold the same figures."
    cells = heat_map(frame, name="layers", title="own ΔNLL (nats/token)", decimals=2, description=text, step=step)
    base = alt.Chart(_data(sums)).encode(
        x=alt.X("layer:O", sort=sums["layer"].to_list(), axis=alt.Axis(title="layer", labelAngle=0),
                scale=alt.Scale(type="band")),
        tooltip=[alt.Tooltip("hookpoint:N"), alt.Tooltip("own:Q", title="own, mean", format="+.5f"),
                 alt.Tooltip("others:Q", title="others, mean", format="+.5f"),
                 alt.Tooltip("rows:Q", title="languages that lose most")],
    )  # fmt: skip
    axis, layers = alt.Axis(title="mean ΔNLL", tickCount=3, grid=True), []
    for key, shape in (("own", "circle"), ("others", "diamond")):
        if sums[key].count():  # a layer without data would leave the axis without an extent
            mine = base.encode(y=alt.Y(f"{key}:Q", axis=axis, scale=alt.Scale(zero=True, nice=True)))
            layers += [mine.mark_line(style=key, strokeWidth=2),
                       mine.mark_point(style=key, shape=shape, size=44, filled=True, opacity=1)]  # fmt: skip
    means = [alt.layer(*layers).properties(width=alt.Step(step), height=110)] if layers else []
    return alt.vconcat(cells, *means, spacing=14, description=text).resolve_scale(color="independent")


def ablation(frame: pl.DataFrame, languages: list[str]) -> alt.LayerChart:
    """Picture 2: dNLL[ablated, evaluated] in nats/token.

    Parameters
    ----------
    frame: `ablated`, `evaluated`, `value`, `low`, `high`, `tokens`, `own`, `largest`.
    languages: the order of rows and columns; a language without a row in `frame` is an empty row.
    """
    largest = max((abs(v) for v in frame["value"].drop_nulls() if math.isfinite(v)), default=0.0) or 1.0
    decimals = 2 if largest >= 0.1 else 3
    base = alt.Chart(_data(_written(frame, decimals))).encode(
        x=alt.X("evaluated:N", scale=alt.Scale(domain=languages),
                axis=alt.Axis(title="evaluated on", orient="top", labelAngle=0, titleAnchor="start")),
        y=alt.Y("ablated:N", scale=alt.Scale(domain=languages), title="features removed"),
        tooltip=[alt.Tooltip("ablated:N", title="removed"), alt.Tooltip("evaluated:N", title="evaluated"),
                 alt.Tooltip("value:Q", title="ΔNLL (nats/token)", format="+.5f"),
                 alt.Tooltip("low:Q", title="95 % from", format="+.5f"),
                 alt.Tooltip("high:Q", title="95 % to", format="+.5f"),
                 alt.Tooltip("tokens:Q", title="tokens", format=",")],
    )  # fmt: skip
    colour = alt.Color(
        "value:Q",
        scale=alt.Scale(range="diverging", domain=[-largest, largest], domainMid=0, interpolate="lab"),
        legend=alt.Legend(title="ΔNLL, nats/token (0: no change)"),
    )
    cells = base.mark_rect().encode(color=colour)
    frames = base.mark_rect(style="frame", fill="transparent", strokeWidth=1.6, aria=False).transform_filter(
        "datum.own"
    )
    texts = base.encode(text="text:N")
    inked = texts.encode(color=_ink("ablation_color"))
    return alt.layer(
        cells,
        frames,
        texts.mark_text(style="nothing", aria=False).transform_filter("datum.text == '0'"),
        inked.mark_text(style="value", aria=False).transform_filter("datum.text != '0' && !datum.largest"),
        inked.mark_text(style="largest", aria=False).transform_filter("datum.text != '0' && datum.largest"),
        name="ablation",
        description="Change of each language's NLL when one language's features are removed; "
        "the table below holds the same figures.",
    ).properties(width=alt.Step(40), height=alt.Step(26))


def own_and_others(frame: pl.DataFrame) -> alt.LayerChart:
    """Bars: each language's own dNLL with its 95 % interval; ticks and lines: the other languages' mean and range.

    Parameters
    ----------
    frame: as `babelscope.report.data.own_and_others` returns it.
    """
    base = alt.Chart(_data(frame)).encode(
        y=alt.Y("language:N", sort=frame["language"].to_list(), title=None),
        tooltip=[alt.Tooltip("language:N"),
                 alt.Tooltip("own:Q", title="own ΔNLL", format="+.5f"),
                 alt.Tooltip("low:Q", title="95 % from", format="+.5f"),
                 alt.Tooltip("high:Q", title="95 % to", format="+.5f"),
                 alt.Tooltip("others:Q", title="others, mean", format="+.5f"),
                 alt.Tooltip("others_low:Q", title="others, least", format="+.5f"),
                 alt.Tooltip("others_high:Q", title="others, largest", format="+.5f"),
                 alt.Tooltip("random:Q", title="random features", format="+.5f")],
    )  # fmt: skip
    axis = alt.Axis(title="ΔNLL, nats/token", grid=True, tickCount=5)
    own, below = {"yOffset": -5}, {"yOffset": 6}
    # A layer without data would leave the axis without an extent.
    control = [base.mark_point(style="random", shape="cross", filled=True, size=36, **below).encode(x="random:Q")]
    return alt.layer(
        base.mark_bar(style="own", height=9, **own).encode(x=alt.X("own:Q", axis=axis)),
        base.mark_rule(strokeWidth=1.5, **own).encode(x="low:Q", x2="high:Q"),
        base.mark_rule(style="others", strokeWidth=1.5, **below).encode(x="others_low:Q", x2="others_high:Q"),
        base.mark_point(style="others", shape="diamond", filled=True, size=44, **below).encode(x="others:Q"),
        *(control if frame["random"].count() else []),
        description="Own and others' change of NLL per language; the table below holds the same figures.",
    ).properties(width=280, height=alt.Step(30))


def against_control(frame: pl.DataFrame) -> alt.LayerChart:
    """Two intervals per language about a line at 0: own - control, and the same beyond what it costs others.

    Parameters
    ----------
    frame: as `babelscope.report.data.against_control` returns it.
    """
    base = alt.Chart(_data(frame)).encode(
        y=alt.Y("language:N", sort=frame["language"].unique(maintain_order=True).to_list(), title=None),
        tooltip=[alt.Tooltip("language:N"), alt.Tooltip("value:Q", title="difference", format="+.5f"),
                 alt.Tooltip("low:Q", title="95 % from", format="+.5f"),
                 alt.Tooltip("high:Q", title="95 % to", format="+.5f")],
    )  # fmt: skip
    axis = alt.Axis(title="more than random features, nats/token", grid=True, tickCount=5)
    layers = [alt.Chart(alt.Data(values=[{"zero": 0}])).mark_rule(strokeWidth=1).encode(x="zero:Q")]
    marks: list[tuple[str, str, Any, int]] = [("own", "own", "circle", -5), ("selective", "others", "diamond", 5)]
    for question, style, shape, offset in marks:
        mine = base.transform_filter(f"datum.question == '{question}'")
        line = mine.mark_rule(style=style, strokeWidth=1.5, yOffset=offset)
        point = mine.mark_point(style=style, shape=shape, filled=True, size=48, opacity=1, yOffset=offset)
        layers += [line.encode(x=alt.X("low:Q", axis=axis), x2="high:Q"), point.encode(x="value:Q")]
    return alt.layer(
        *layers, description="Own features against random ones that fire as often; the table below holds the figures."
    ).properties(width=320, height=alt.Step(30))


def similarity(frame: pl.DataFrame) -> alt.LayerChart:
    """Language x language: the Jaccard index of their features, in percent.

    Parameters
    ----------
    frame: as `babelscope.report.data.similarity` returns it; its order is that of rows and columns.
    """
    labels, languages = (frame[name].unique(maintain_order=True).to_list() for name in ("label", "language"))
    written = frame.with_columns(
        pl.Series("text", [plain(None if v is None else 100 * v) if v is not None else "" for v in frame["value"]])
    )
    base = alt.Chart(_data(written)).encode(
        x=alt.X("other:N", scale=alt.Scale(domain=languages),
                axis=alt.Axis(title=None, orient="top", labelAngle=0)),
        y=alt.Y("label:N", scale=alt.Scale(domain=labels), axis=alt.Axis(title=None, labelLimit=260)),
        tooltip=[alt.Tooltip("label:N", title="language"), alt.Tooltip("other_label:N", title="and"),
                 alt.Tooltip("value:Q", title="Jaccard index", format=".3f"),
                 alt.Tooltip("units:Q", title="features of both"), alt.Tooltip("expected:N", title="relatives")],
    )  # fmt: skip
    scale = alt.Scale(range="ramp", zero=True) if frame["value"].max() else alt.Scale(range="ramp", domain=[0, 1])
    cells = base.mark_rect().encode(color=alt.Color("value:Q", scale=scale, legend=None))
    texts = base.mark_text(style="value", aria=False).encode(text="text:N", color=_ink("similarity_color"))
    return alt.layer(
        cells, texts, name="similarity",
        description="Share of features that two languages have in common; the table below holds the same figures.",
    ).properties(width=alt.Step(40), height=alt.Step(24))  # fmt: skip


def confusion(frame: pl.DataFrame) -> alt.HConcatChart:
    """A matrix per method: what share of a language's texts was taken for which language, with the numbers of texts.

    Parameters
    ----------
    frame: as `babelscope.report.data.confusion` returns it.
    """
    description = "Which language held-out texts were taken for; the table below holds the same figures."
    panels = []
    for number, method in enumerate(frame["method"].unique(maintain_order=True)):
        mine = frame.filter(pl.col("method") == method)
        languages = mine["language"].unique(maintain_order=True).to_list()
        base = alt.Chart(_data(mine)).encode(
            x=alt.X("predicted:N", scale=alt.Scale(domain=languages),
                    axis=alt.Axis(title=f"taken for, by {method}", orient="top", labelAngle=-90, titleAnchor="start")),
            y=alt.Y("language:N", scale=alt.Scale(domain=languages), title="text in"),
            tooltip=[alt.Tooltip("language:N", title="text in"), alt.Tooltip("predicted:N", title="taken for"),
                     alt.Tooltip("texts:Q"), alt.Tooltip("value:Q", title="share", format=".1%")],
        )  # fmt: skip
        scale = alt.Scale(range="ramp", domain=[0, 1])
        cells = base.mark_rect().encode(color=alt.Color("value:Q", scale=scale, legend=None))
        texts = base.mark_text(style="value", aria=False).encode(text="texts:Q", color=_ink(f"confusion{number}_color"))
        panels.append(
            alt.layer(cells, texts.transform_filter("datum.texts > 0"), name=f"confusion{number}").properties(
                width=alt.Step(24), height=alt.Step(22)
            )
        )
    return alt.hconcat(*panels, spacing=28, description=description).resolve_scale(color="independent")


def steering(frame: pl.DataFrame) -> alt.HConcatChart:
    """Success and NLL per language and strength, and their means over the languages as curves.

    Parameters
    ----------
    frame: as `babelscope.report.data.steering` returns it.
    """
    description = "Success and fluency of steered text by strength; the table below holds the same figures."
    labelled = frame.with_columns(pl.Series("strength", [f"{value:g}" for value in frame["strength"]]))
    kinds = (("success", "share in the language, not degenerate", 2), ("nll", "NLL, nats/token", 1))
    means = labelled.group_by("strength", maintain_order=True).agg(pl.col("success", "nll").mean())
    columns = []
    for key, title, decimals in kinds:
        cells = heat_map(
            labelled.with_columns(value=pl.col(key)), name=f"steer_{key}", title=title, decimals=decimals,
            description=title, axis="strength", step=46,
        ).properties(title=title)  # fmt: skip
        base = alt.Chart(_data(means)).encode(
            x=alt.X("strength:O", sort=means["strength"].to_list(), axis=alt.Axis(labelAngle=0),
                    scale=alt.Scale(type="band")),
            y=alt.Y(f"{key}:Q", title="mean", axis=alt.Axis(tickCount=3), scale=alt.Scale(zero=True)),
            tooltip=[alt.Tooltip("strength:O"), alt.Tooltip(f"{key}:Q", title=title, format=".3f")],
        )  # fmt: skip
        points = base.mark_point(style="own", filled=True, size=36, opacity=1)
        curve = alt.layer(base.mark_line(style="own"), points).properties(width=alt.Step(46), height=90)
        columns.append(alt.vconcat(cells, curve, spacing=14).resolve_scale(color="independent"))
    return alt.hconcat(*columns, spacing=28, description=description).resolve_scale(color="independent")


def spec(chart: Any) -> dict[str, Any]:
    """The chart as a Vega-Lite specification, checked against the schema."""
    result: dict[str, Any] = chart.to_dict()
    return result


def png(chart: Any) -> bytes:
    """The chart as a PNG on white, twice the size for dense screens, in a font that vl-convert brings along."""
    theme = _theme(_LIGHT, "Liberation Sans") | {"background": "#ffffff", "padding": 12}
    image: bytes = vl_convert.vegalite_to_png(json.dumps(spec(chart)), config=theme, scale=2)
    return image


@cache
def javascript() -> str:
    """Vega, Vega-Lite and vega-embed as one script (an ES module) that fetches nothing."""
    bundle: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    # Inside a string of the script this would end the HTML element that holds it.
    return bundle.replace("</script", "<\\/script")
