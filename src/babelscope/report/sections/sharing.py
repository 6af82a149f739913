"""Section `sharing`: latents that fire on a text and on its translations."""

import altair as alt
import polars as pl

from babelscope.report import charts
from babelscope.report.numbers import NONE, percent, plain
from babelscope.report.parts import Picture, ReportInputs, Section, Table, figures, layer_labels, prose
from babelscope.report.relatives import means_by_relation, relation


def section(inputs: ReportInputs) -> Section | None:
    """Jaccard index of translations and of random pairs by layer; None if `sharing.groups` is 0."""
    frame = by_layer(inputs)
    if frame.is_empty():
        return None
    caption = prose(
        """<p>Of the latents that fire on a text or on its translation, the share that fires on both (Jaccard index,
mean over the pairs of languages). A circle is for translations, a diamond for texts with different contents in the
same two languages: the distance between the two is what the latents know of the content, whatever the language.</p>"""
    )
    rule = prose(
        """<p>The table also has the share of the first component of the languages’ mean activations, each minus the
mean of the others’. According to Al Ghussin et al. 2026 (arXiv 2605.23036), languages are aligned in a layer with a
large share and separable in one with a small share, and the layer to steer is the one with a share next to 0.5: here
{layer} ({share}).</p>""",
        **dict(zip(("layer", "share"), steered(frame), strict=True)),
    )
    parts = [caption, rule] if frame["first_component"].count() else [caption]
    if likeness := means_by_relation(excess(inputs).select("relation", value="excess")):
        kinds = "; ".join(f"{kind} {plain(value, 3, sign=True)}" for kind, value in likeness.items())
        parts.append(prose("<p>Translations minus random pairs, mean over the layers: {kinds}.</p>", kinds=kinds))
    label = "Share of latents that fire on both of two texts, for translations and for random pairs"
    picture = Picture("sharing", label, chart(frame), parts)
    means = (percent(frame[name].mean(), 0) for name in ("translations", "random"))
    title = "Translations have {} of their active latents in common, other texts {}".format(*means)
    return Section("sharing", "Translations", title, [picture, layers(frame), pairs(inputs)])


def by_layer(inputs: ReportInputs) -> pl.DataFrame:
    """`hookpoint`, `layer`, `translations`, `random`, `first_component`, `correlation`; empty without rows."""
    if (rows := listed(inputs)).is_empty():
        return pl.DataFrame()
    means = rows.group_by("hookpoint").agg(pl.col("translations", "random").mean())
    labels = layer_labels(inputs.hookpoints)
    frame = pl.DataFrame({"hookpoint": list(labels), "layer": list(labels.values())})
    extra = {
        name: pl.Series(inputs.each("sharing", key, labels), dtype=pl.Float64)
        for name, key in (("first_component", "first_component"), ("correlation", "typology_correlation"))
    }
    return frame.join(means, on="hookpoint", maintain_order="left").with_columns(**extra)


def listed(inputs: ReportInputs) -> pl.DataFrame:
    """The rows of languages that params.yaml lists."""
    if inputs.sharing is None:
        return pl.DataFrame()
    return inputs.sharing.filter(pl.all_horizontal(pl.col("language", "other").is_in(inputs.languages)))


def steered(frame: pl.DataFrame) -> tuple[str, str]:
    """The hookpoint whose first component's share is next to 0.5, and that share."""
    known = frame.drop_nulls("first_component").sort((pl.col("first_component") - 0.5).abs())
    if known.is_empty():
        return NONE, NONE
    return known["hookpoint"][0], plain(known["first_component"][0], 2)


def excess(inputs: ReportInputs) -> pl.DataFrame:
    """The means over the hookpoints of every pair of languages, with `excess` and `relation`."""
    frame = (
        listed(inputs)
        .group_by("language", "other", maintain_order=True)
        .agg(pl.col("groups").max(), pl.col("translations", "random", "typology").mean())
    )
    known = pl.Series([relation(*row) for row in frame.select("language", "other").rows()], dtype=pl.String)
    return frame.with_columns(excess=pl.col("translations") - pl.col("random"), relation=known)


def chart(frame: pl.DataFrame) -> alt.LayerChart:
    """`by_layer` as two lines."""
    base = alt.Chart(charts.data(frame)).encode(
        x=charts.bands("layer", frame["layer"], title="layer"),
        tooltip=charts.tips("hookpoint:N", ("translations:Q", "translations", ".3f"),
                            ("random:Q", "random pairs", ".3f"), ("first_component:Q", "first component", ".2f")),
    )  # fmt: skip
    y = {"axis": alt.Axis(title="Jaccard index", tickCount=4, grid=True), "scale": alt.Scale(zero=True, nice=True)}
    lines = charts.curve(base, "translations", "own", "circle", **y)
    lines += charts.curve(base, "random", "others", "diamond", **y)
    what = "Jaccard index of the latents of translations and of random pairs by layer"
    text = f"{what}; the table holds the same figures."
    return alt.layer(*lines, name="sharing", description=text).properties(width=alt.Step(60), height=200)


def layers(frame: pl.DataFrame) -> Table:
    """`by_layer`."""
    columns = {
        "hookpoint": frame["hookpoint"], "translations": figures(frame["translations"], 3),
        "random pairs": figures(frame["random"], 3), "first component": figures(frame["first_component"], 2),
        "correlation with typological distance": figures(frame["correlation"], 2, sign=True),
    }  # fmt: skip
    return Table.of("Jaccard index of the latents that fire on two texts, means over the pairs of languages", columns)


def pairs(inputs: ReportInputs) -> Table:
    """The pairs of languages, those whose translations share most beyond random pairs first."""
    frame = excess(inputs).sort(-pl.col("excess").round(4), inputs.order("language"), inputs.order("other"))
    columns = {
        "language": frame["language"], "and": frame["other"], "texts": figures(frame["groups"]),
        "translations": figures(frame["translations"], 3), "random pairs": figures(frame["random"], 3),
        "relation": frame["relation"].fill_null(NONE), "typological distance": figures(frame["typology"], 2),
    }  # fmt: skip
    text = "Jaccard index of the latents that fire on two texts, means over the hookpoints"
    return Table.of(text, columns, labels=2, folded="translations, by pair of languages")
