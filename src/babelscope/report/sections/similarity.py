"""Section `similarity`: which languages share features."""

import altair as alt
import polars as pl

from babelscope.report import charts
from babelscope.report.names import called, name
from babelscope.report.numbers import NONE, percent, plain
from babelscope.report.parts import Picture, ReportInputs, Section, Table, figures, how_to_read, prose
from babelscope.report.relatives import means_by_relation, relation, relatives


def section(inputs: ReportInputs) -> Section | None:
    """The Jaccard index of every two languages; None if there are fewer than three languages, or no such table."""
    frame = similarity(inputs)
    if frame.is_empty():
        return None
    caption = how_to_read(
        """<p>Of the features that at least one of two languages has, a cell shows the percentage that both have (the
Jaccard index). A feature counts for every language that it belongs to. Similar languages are next to each other; the
branch and the script of a language come from reference data and did not influence the order.</p>"""
    )
    likeness = means_by_relation(frame.select("value", relation="expected"))
    means = prose(
        """<p>Mean Jaccard index of two languages: {means}. A feature that two related languages share is specific to
neither, so a language with a close relative in the set tends to have few features of its own.</p>""",
        means="; ".join(f"{kind} {plain(value, 2)}" for kind, value in likeness.items()),
    )
    label = "Percentage of features that two languages have in common"
    picture = Picture("similarity", label, chart(frame), [means, caption] if likeness else [caption])
    counts = [str(count) for count in range(1, len(inputs.languages) + 1)]
    columns = {"languages": counts, "features": figures(inputs.each("score", "shared_by", counts))}
    text = "features by the number of languages that share them"
    shared = Table.of(text.capitalize(), columns, folded=text)
    return Section("similarity", "Shared features", finding(frame), [picture, shared, table(frame, inputs)])


def finding(frame: pl.DataFrame) -> str:
    """The pair with most in common, and how much related and unrelated languages share."""
    pairs = frame.drop_nulls("value")
    if pairs.is_empty():
        return "Which languages share features"
    best = pairs.sort("value", descending=True, maintain_order=True).row(0, named=True)
    return (
        f"{name(best['language'])} and {name(best['other'])} share most features: {percent(best['value'], 0)} of theirs"
    )


def similarity(inputs: ReportInputs) -> pl.DataFrame:
    """How alike the features of every two languages are; empty with fewer than three languages.

    The columns are `language`, `other`, `units`, `value` (Jaccard index; null on the diagonal), `label`, `other_label`
    (with branch and script if known) and `expected` ("same branch", "same script", "neither"; null if not known). Rows
    are in the order of the leaves of an average-linkage tree over 1 - Jaccard (Bar-Joseph et al. 2001).
    """
    languages = inputs.languages
    if inputs.similarity is None or len(languages) < 3:
        return pl.DataFrame()
    pairs = inputs.similarity.filter(pl.col("language").is_in(languages), pl.col("other").is_in(languages))
    known = {one: relatives(one) for one in languages}
    label = {one: f"{called(one)}, {', '.join(kin)}" if (kin := known[one]) else called(one) for one in languages}

    order = pl.Enum(_leaves(pairs, languages))
    ranked = pairs.sort(pl.col("language").cast(order), pl.col("other").cast(order))
    expected = [relation(*row) for row in ranked.select("language", "other").rows()]
    return ranked.with_columns(
        value=pl.when(pl.col("language") != pl.col("other")).then(pl.col("jaccard")),
        label=pl.col("language").replace_strict(label, return_dtype=pl.String),
        other_label=pl.col("other").replace_strict(label, return_dtype=pl.String),
        expected=pl.Series(expected, dtype=pl.String),
    ).drop("jaccard")


def _leaves(pairs: pl.DataFrame, languages: list[str]) -> list[str]:
    """The languages in the order of the leaves of a tree over their distances."""
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    known = {(a, b): value for a, b, value in pairs.select("language", "other", "jaccard").rows()}
    distance = [[0.0 if a == b else 1.0 - (known.get((a, b)) or 0.0) for b in languages] for a in languages]
    tree = linkage(squareform(distance), method="average", optimal_ordering=True)
    return [languages[leaf] for leaf in leaves_list(tree)]


def chart(frame: pl.DataFrame) -> alt.LayerChart:
    """`similarity` as a heat map, in percent."""
    labels, languages = (frame[name].unique(maintain_order=True).to_list() for name in ("label", "language"))
    texts = pl.Series("text", ["" if value is None else plain(100 * value) for value in frame["value"]])
    base = alt.Chart(charts.data(frame.with_columns(texts))).encode(
        x=alt.X("other:N", scale=alt.Scale(domain=languages), axis=alt.Axis(title=None, orient="top", labelAngle=0)),
        y=alt.Y("label:N", scale=alt.Scale(domain=labels), axis=alt.Axis(title=None, labelLimit=260)),
        tooltip=charts.tips(("label:N", "language"), ("other_label:N", "and"), ("value:Q", "Jaccard index", ".3f"),
                            ("units:Q", "features of both"), ("expected:N", "relation")),
    )  # fmt: skip
    text = "Percentage of features that two languages have in common; the table below holds the same figures."
    layers = charts.cells(base, "similarity", charts.ramp(frame))
    return alt.layer(*layers, name="similarity", description=text).properties(width=alt.Step(40), height=alt.Step(24))


def table(frame: pl.DataFrame, inputs: ReportInputs) -> Table:
    """The pairs of languages, those with most features in common first."""
    first, second = inputs.order("language"), inputs.order("other")
    pairs = frame.drop_nulls("value").filter(first < second).sort(-pl.col("value").round(3), first, second)
    columns = {
        "language": pairs["language"], "and": pairs["other"], "Jaccard index": figures(pairs["value"], 3),
        "features of both": figures(pairs["units"]), "relation": pairs["expected"].fill_null(NONE),
    }  # fmt: skip
    text = "Features that two languages have in common"
    return Table.of(text, columns, labels=2, folded="features in common, by pair of languages")
