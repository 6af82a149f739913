"""Section `layers`: what the features of each hookpoint do alone."""

import altair as alt
import polars as pl

from babelscope.report import charts
from babelscope.report.numbers import NONE
from babelscope.report.parts import Picture, ReportInputs, Section, Table, figures, prose
from babelscope.report.sections.ablation import of_method
from babelscope.report.sections.features import counts


def section(inputs: ReportInputs) -> Section | None:
    """Own dNLL with one hookpoint ablated alone; None if no hookpoint was."""
    frame = own_by_layer(inputs)
    if frame.is_empty():
        return None
    first = prose(
        """<p>The same measurement with the features of one layer removed alone: what it costs the language they belong to, in
nats per token. Layers do not add up to the matrix above, since a later layer can make good what an earlier one lost. Many
features (first picture) with little effect here are a sign of redundancy.</p>
<p>Below, the means over the languages: circles, what it costs the language the features belong to; diamonds, what it costs
the others (on a sample of their texts together as large as the language's own). A layer is selective where the circle lies far above the diamond.</p>"""
    )
    label = "Change of NLL with one layer ablated alone: own by language, own and others by layer"
    picture = Picture("layers", label, chart(frame), [first, selective_table(inputs)])
    caption = "Own ΔNLL with one hookpoint ablated alone, nats/token"
    table = Table.grid(caption, frame, 4, "Table: own ΔNLL per layer and language")
    return Section("layers", "Layer by layer", "Which layer does it", [picture, table])


def own_by_layer(inputs: ReportInputs) -> pl.DataFrame:
    """What ablating each language's features at one hookpoint alone does to it and to the others.

    Returns
    -------
    The whole grid, `language`, `hookpoint`, `layer`: `value` (own dNLL), `low`, `high` (its 95 % interval), `others`
    (mean over the other languages), `others_high` (the largest of them); nats/token, null if there was no run.
    Empty without such runs.
    """
    if inputs.by_layer is None or inputs.by_layer.is_empty():
        return pl.DataFrame()
    runs = of_method(inputs, inputs.by_layer).filter(pl.col("control").is_null(), pl.col("ablated").is_not_null())
    own = runs.filter(pl.col("ablated") == pl.col("evaluated"))
    others = (
        runs.filter(pl.col("ablated") != pl.col("evaluated"))
        .group_by("ablated", "hookpoint", maintain_order=True)
        .agg(others=pl.col("delta").mean(), others_high=pl.col("delta").max())
    )
    own = own.join(others, on=["ablated", "hookpoint"], how="left", maintain_order="left")
    own = own.select("hookpoint", "low", "high", "others", "others_high", language="ablated", value="delta")
    return inputs.grid().join(own, on=["language", "hookpoint"], how="left", maintain_order="left")


def selectivity(frame: pl.DataFrame) -> pl.DataFrame:
    """`own_by_layer` summed up over the languages: how selective each hookpoint is alone.

    Returns
    -------
    One row per hookpoint: `hookpoint`, `layer`, `own`, `others` (means over the languages with a run; null if there
    are none), `rows` (languages that lose more than any other does; null if no other was evaluated).
    """
    ahead = (pl.col("value") > pl.col("others_high")) & (pl.col("value") > 0)
    return frame.group_by("hookpoint", "layer", maintain_order=True).agg(
        own=pl.col("value").mean(),
        others=pl.col("others").mean(),
        rows=pl.when(pl.col("others_high").count() > 0).then(ahead.sum()),
    )


def chart(frame: pl.DataFrame) -> alt.VConcatChart:
    """`own_by_layer` as a heat map, and below it own against others over all languages."""
    sums = selectivity(frame)
    text = "Change of NLL with one layer's features removed alone; the tables hold the same figures."
    cells = charts.heat_map(frame, name="layers", title="own ΔNLL (nats/token)", decimals=2, description=text)
    base = alt.Chart(charts.data(sums)).encode(
        x=charts.bands("layer", sums["layer"], title="layer"),
        tooltip=charts.tips("hookpoint:N", ("own:Q", "own, mean", charts.SIGNED),
                            ("others:Q", "others, mean", charts.SIGNED), ("rows:Q", "languages that lose most")),
    )  # fmt: skip
    axis, layers = alt.Axis(title="mean ΔNLL", tickCount=3, grid=True), []
    for key, shape in (("own", "circle"), ("others", "diamond")):
        if sums[key].count():  # a layer without data would leave the axis without an extent
            marks = base.encode(y=alt.Y(f"{key}:Q", axis=axis, scale=alt.Scale(zero=True, nice=True)))
            layers += [marks.mark_line(style=key, strokeWidth=2),
                       marks.mark_point(style=key, shape=shape, size=44, filled=True, opacity=1)]  # fmt: skip
    means = [alt.layer(*layers).properties(width=alt.Step(42), height=110)] if layers else []
    return charts.below(cells, *means, description=text)


def selective_table(inputs: ReportInputs) -> Table:
    """`selectivity`, and the number of features."""
    features = counts(inputs).group_by("hookpoint", maintain_order=True).agg(pl.col("value").sum())
    frame, total = selectivity(own_by_layer(inputs)), len(inputs.languages)
    columns = {
        "hookpoint": frame["hookpoint"],
        "features": figures(features["value"]),
        "own ΔNLL": figures(frame["own"], 4, sign=True),
        "others’ ΔNLL": figures(frame["others"], 5, sign=True),
        "diagonal largest": [NONE if rows is None else f"{rows} of {total}" for rows in frame["rows"]],
    }
    return Table.of("One hookpoint ablated alone, means over the languages, nats/token", columns)
