"""Section `layers`: what the features of each hookpoint do alone."""

import altair as alt
import polars as pl

from babelscope.report import charts
from babelscope.report.numbers import NONE, significant
from babelscope.report.parts import Picture, ReportInputs, Section, Table, figures, how_to_read, prose
from babelscope.report.sections.ablation import of_method
from babelscope.report.sections.features import sums


def section(inputs: ReportInputs) -> Section | None:
    """Own dNLL with one hookpoint ablated alone; None if no hookpoint was."""
    frame = own_by_layer(inputs)
    if frame.is_empty():
        return None
    caption = how_to_read(
        """<p>Here the features of one layer at a time are removed. A cell is the ΔNLL, in nats per token, of the
language to which the features belong. The layers do not add up to the matrix above, because later layers can make up
for what an earlier one lost. Many features with little effect suggest that they are redundant.</p>
<p>Below the cells, a circle is the mean of these ΔNLLs over the languages. A diamond is the mean ΔNLL of the other
languages, measured on some texts of every fourth other language. A layer is selective if its
circle lies far above its diamond.</p>"""
    )
    means = selectivity(frame).drop_nulls("own")
    result = prose(
        """<p>The table below has the mean over the languages for each hookpoint, and in how many languages the language
itself loses most. {small} of the {count} hookpoints cost a language less than 0.1 nats/token on average.</p>""",
        small=means.filter(pl.col("own") < 0.1).height,
        count=len(means),
    )
    label = "ΔNLL with the features of one layer removed, by language and on average"
    picture = Picture("layers", label, chart(frame), [result, caption])
    text = "ΔNLL of the language itself with the features of one hookpoint removed, nats/token"
    table = Table.grid(text, frame, 4, "ΔNLL per layer and language")
    return Section("layers", "Layers", finding(frame), [picture, selective_table(inputs), table])


def finding(frame: pl.DataFrame) -> str:
    """The layer whose features alone matter most to their languages."""
    means = selectivity(frame).drop_nulls("own").sort("own", descending=True, maintain_order=True)
    if means.is_empty():
        return "Which layers matter"
    best = means.row(0, named=True)
    return f"Alone, the features of layer {best['layer']} matter most: {significant(best['own'], sign=True)} nats/token"


def own_by_layer(inputs: ReportInputs) -> pl.DataFrame:
    """The dNLL of each language, and of the others, without its features at one hookpoint.

    The whole grid with `low`, `high` (95 %), `others` and `others_high` (mean and largest of the other languages),
    `value` (own dNLL), in nats/token, null without a run. Empty without any run.
    """
    if inputs.by_layer is None or inputs.by_layer.is_empty():
        return pl.DataFrame()
    runs = of_method(inputs, inputs.by_layer).filter(pl.col("control").is_null())
    own = runs.filter(pl.col("ablated") == pl.col("evaluated"))
    others = runs.filter(pl.col("ablated") != pl.col("evaluated")).group_by("ablated", "hookpoint", maintain_order=True)
    means = others.agg(others=pl.col("delta").mean(), others_high=pl.col("delta").max())
    own = own.join(means, on=["ablated", "hookpoint"], how="left", maintain_order="left")
    own = own.select("hookpoint", "low", "high", "others", "others_high", language="ablated", value="delta")
    return inputs.grid().join(own, on=["language", "hookpoint"], how="left", maintain_order="left")


def selectivity(frame: pl.DataFrame) -> pl.DataFrame:
    """`own_by_layer` over all languages, one row per hookpoint: how selective each is alone.

    The columns are `hookpoint`, `layer`, `own`, `others` (means, null without a run) and `rows` (languages that lose
    more than any other does; null if no other was evaluated).
    """
    ahead = (pl.col("value") > pl.col("others_high")) & (pl.col("value") > 0)
    return frame.group_by("hookpoint", "layer", maintain_order=True).agg(
        own=pl.col("value").mean(),
        others=pl.col("others").mean(),
        rows=pl.when(pl.col("others_high").count() > 0).then(ahead.sum()),
    )


def chart(frame: pl.DataFrame) -> alt.VConcatChart:
    """`own_by_layer` as a heat map, and below it own against others over all languages."""
    means = selectivity(frame)
    text = "Change of NLL with one layer's features removed alone; the tables hold the same figures."
    cells = charts.heat_map(frame, name="layers", title="ΔNLL (nats/token)", decimals=2, description=text)
    base = alt.Chart(charts.data(means)).encode(
        x=charts.bands("layer", means["layer"], title="layer"),
        tooltip=charts.tips("hookpoint:N", ("own:Q", "itself, mean", charts.SIGNED),
                            ("others:Q", "others, mean", charts.SIGNED), ("rows:Q", "languages that lose most")),
    )  # fmt: skip
    axis, scale = alt.Axis(title="mean ΔNLL", tickCount=3, grid=True), alt.Scale(zero=True, nice=True)
    layers = []
    for key, shape in (("own", "circle"), ("others", "diamond")):
        if means[key].count():  # a layer without data would leave the axis without an extent
            layers += charts.curve(base, key, key, shape, axis=axis, scale=scale)
    entries = [("own", "circle", "the language itself"), ("others", "diamond", "other languages")]
    size = {"width": alt.Step(charts.column_width(len(means))), "height": 120}
    curves = [alt.layer(*layers).properties(**size), charts.legend(*entries)] if layers else []
    return charts.below(cells, *curves, description=text)


def selective_table(inputs: ReportInputs) -> Table:
    """`selectivity`, and the number of features."""
    frame, total = selectivity(own_by_layer(inputs)), len(inputs.languages)
    columns = {
        "hookpoint": frame["hookpoint"], "features": figures(sums(inputs, "hookpoint")["value"]),
        "ΔNLL of itself": figures(frame["own"], 4, sign=True), "of others": figures(frame["others"], 5, sign=True),
        "largest on itself": [NONE if rows is None else f"{rows} of {total}" for rows in frame["rows"]],
    }  # fmt: skip
    return Table.of("One hookpoint’s features removed, means over the languages, nats/token", columns)
