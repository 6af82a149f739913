"""Section `stability`: whether SAEs from other seeds have the same features, one by one and as sets."""

import altair as alt
import polars as pl

from babelscope.report import charts
from babelscope.report.numbers import percent, plain
from babelscope.report.parts import Picture, ReportInputs, Section, Table, figures, how_to_read, prose

_COLUMNS = {
    "overlap": "subspace_overlap", "random": "subspace_overlap_random", "random_high": "subspace_overlap_random_high",
    "write": "write_cosine", "matched": "features_matched_share",
}  # fmt: skip


def section(inputs: ReportInputs) -> Section | None:
    """Single features and sets of them in an SAE from another seed; None without such an SAE."""
    frame = by_language(inputs)
    if frame.is_empty():
        return None
    seeds = len(inputs.params.get("stability", {}).get("seeds", []))
    result = prose(
        """<p>{matched} of {features} features have a partner of their own in the other SAE whose decoder and encoder
directions are both similar; of all latents, {latents} have. So treat a single feature as one of many ways to divide the
space, and the features of a language together as the result.{seeds}</p>""",
        matched=percent(inputs.figure("stability", "features_matched_share")),
        features=plain(inputs.figure("stability", "stability_features")),
        latents=percent(inputs.figure("stability", "latents_matched_share")),
        seeds=f" All figures are means over the SAEs of {seeds} other seeds." if seeds > 1 else "",
    )
    reading = how_to_read(
        """<p>Circle: how much the directions of a language’s features span the same subspace in both SAEs (mean squared
cosine of the principal angles; 1 is the same subspace). Cross: the same for random latents that fire on the language,
with a line to the upper end of their 95&nbsp;% interval. A circle to the right of the line is evidence that the set
comes again. Diamond: the cosine between what both sets write into the model, averaged over the language’s
tokens.</p>"""
    )
    picture = Picture("stability", "Features of a second SAE, by language", chart(frame), [result, reading])
    return Section("stability", "Other seed", finding(inputs), [picture, table(frame)])


def finding(inputs: ReportInputs) -> str:
    """The share of features that match, and in how many languages the sets do."""
    frame = by_language(inputs).drop_nulls(["overlap", "random_high"])
    above = frame.filter(pl.col("overlap") > pl.col("random_high")).height
    return (
        f"Another seed gives {percent(inputs.figure('stability', 'features_matched_share'), 0)} of the features one by "
        f"one, but their subspace beyond chance in {above} of {len(inputs.languages)} languages"
    )


def by_language(inputs: ReportInputs) -> pl.DataFrame:
    """`language` and the keys of `_COLUMNS` (null if not known); empty without any overlap."""
    values = {column: inputs.each("stability", key) for column, key in _COLUMNS.items()}
    if all(value is None for value in values["overlap"]):
        return pl.DataFrame()
    return pl.DataFrame({"language": inputs.languages} | values, schema_overrides=dict.fromkeys(_COLUMNS, pl.Float64))


def chart(frame: pl.DataFrame) -> alt.VConcatChart:
    """Overlap against random latents, and the cosine of what the sets write."""
    titles = {"overlap": "subspace overlap", "random": "of random latents", "random_high": "95 % of these up to",
              "write": "write cosine"}  # fmt: skip
    base = charts.by_language(frame, *((f"{key}:Q", title, ".3f") for key, title in titles.items()))
    x = alt.X("overlap:Q", scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(title="overlap, or cosine", grid=True))
    marks = [("overlap", "own", "circle", 52), ("random", "random", "cross", 36), ("write", "others", "diamond", 44)]
    points = [
        base.mark_point(style=style, shape=shape, filled=True, size=size, opacity=1).encode(
            x=x if key == "overlap" else f"{key}:Q"
        )
        for key, style, shape, size in marks
        if frame[key].count()
    ]
    lines = [base.mark_rule(style="random", strokeWidth=1).encode(x="random:Q", x2="random_high:Q")]
    names = {"overlap": "overlap", "random": "of random latents", "write": "write cosine"}
    entries = [(style, shape, names[key]) for key, style, shape, _ in marks]
    plot = alt.layer(*(lines if frame["random"].count() else []), *points).properties(width=480, height=alt.Step(28))
    text = "Agreement of a language's features with those of an SAE from another seed; the table holds the figures."
    return charts.below(plot, charts.legend(*entries), description=text)


def table(frame: pl.DataFrame) -> Table:
    """`by_language` as text."""
    columns = {
        "language": frame["language"], "matched one by one": map(percent, frame["matched"]),
        "subspace overlap": figures(frame["overlap"], 3), "of random latents": figures(frame["random"], 3),
        "95 % of these up to": figures(frame["random_high"], 3), "write cosine": figures(frame["write"], 3),
    }  # fmt: skip
    text = "Features of a second SAE, from another seed"
    return Table.of(text, columns, folded="agreement with another seed, by language")
