"""Section `similarity`: which languages share features."""

import altair as alt
import polars as pl

from babelscope.report import charts
from babelscope.report.numbers import NONE, plain
from babelscope.report.parts import Picture, ReportInputs, Section, Table, figures, prose
from babelscope.report.relatives import relatives


def section(inputs: ReportInputs) -> Section | None:
    """The Jaccard index of every two languages; None if there are fewer than three languages, or no such table."""
    frame = similarity(inputs)
    if frame.is_empty():
        return None
    caption = [
        prose(
            """<p>Of the features that either of two languages has, how many in a hundred both have (Jaccard index; a language has a feature if
it is a member of it, however many share it). Languages that are most alike stand side by side; branch and script are
what is known of them from elsewhere, and took no part in the order.</p>"""
        )
    ]
    means = likeness(frame)
    if means:
        names = {"same script": "same script, other branch"}
        caption.append(
            prose(
                """<p>Mean over pairs: {means}.
A language with a close relative in the set owns few features alone: what the two share is neither’s.</p>""",
                means="; ".join(f"{names.get(kind, kind)} {plain(value, 2)}" for kind, value in means.items()),
            )
        )
    picture = Picture("similarity", "Share of features that two languages have in common", chart(frame), caption)
    title, tables = "Which languages share features", (shared_table(inputs), table(frame, inputs.languages))
    return Section("similarity", "Shared features", title, [picture, *tables])


def similarity(inputs: ReportInputs) -> pl.DataFrame:
    """How alike the languages' features are, those that are most alike side by side.

    Returns
    -------
    `language`, `other`, `units`, `value` (Jaccard index; null on the diagonal), `label`, `other_label` (with branch and
    script if known), `expected` ("same branch", "same script", "neither", null if not known) in the order of the
    leaves of an average-linkage tree over 1 - Jaccard (optimal leaf order; Bar-Joseph et al. 2001). Empty with fewer
    than three languages.
    """
    languages = inputs.languages
    if inputs.similarity is None or len(languages) < 3:
        return pl.DataFrame()
    pairs = inputs.similarity.filter(pl.col("language").is_in(languages), pl.col("other").is_in(languages))
    known = {name: relatives(name) for name in languages}
    label = {name: f"{name} ({', '.join(kin)})" if (kin := known[name]) else name for name in languages}

    def expected(first: str, second: str) -> str | None:
        one, two = known[first], known[second]
        if one is None or two is None:
            return None
        return "same branch" if one[0] == two[0] else "same script" if one[1] == two[1] else "neither"

    ranked = pairs.with_columns(pl.col("language", "other").cast(pl.Enum(_order(pairs, languages))))
    ranked = ranked.sort("language", "other").with_columns(pl.col("language", "other").cast(pl.String))
    relation = [expected(*row) for row in ranked.select("language", "other").rows()]
    return ranked.with_columns(
        value=pl.when(pl.col("language") != pl.col("other")).then(pl.col("jaccard")),
        label=pl.col("language").replace_strict(label, return_dtype=pl.String),
        other_label=pl.col("other").replace_strict(label, return_dtype=pl.String),
        expected=pl.Series(relation, dtype=pl.String),
    ).drop("jaccard")


def _order(pairs: pl.DataFrame, languages: list[str]) -> list[str]:
    """The languages in the order of the leaves of a tree over their distances."""
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    known = {(a, b): value for a, b, value in pairs.select("language", "other", "jaccard").rows()}
    distance = [[0.0 if a == b else 1.0 - (known.get((a, b)) or 0.0) for b in languages] for a in languages]
    tree = linkage(squareform(distance), method="average", optimal_ordering=True)
    return [languages[leaf] for leaf in leaves_list(tree)]


def likeness(frame: pl.DataFrame) -> dict[str, float]:
    """Mean Jaccard index of the pairs of languages of the same branch, of the same script only, and of neither."""
    means = dict(frame.drop_nulls("value").group_by("expected").agg(pl.col("value").mean()).iter_rows())
    return {key: means[key] for key in ("same branch", "same script", "neither") if key in means}


def chart(frame: pl.DataFrame) -> alt.LayerChart:
    """`similarity` as a heat map, in percent."""
    labels, languages = (frame[name].unique(maintain_order=True).to_list() for name in ("label", "language"))
    texts = pl.Series("text", ["" if value is None else plain(100 * value) for value in frame["value"]])
    base = alt.Chart(charts.data(frame.with_columns(texts))).encode(
        x=alt.X("other:N", scale=alt.Scale(domain=languages), axis=alt.Axis(title=None, orient="top", labelAngle=0)),
        y=alt.Y("label:N", scale=alt.Scale(domain=labels), axis=alt.Axis(title=None, labelLimit=260)),
        tooltip=charts.tips(("label:N", "language"), ("other_label:N", "and"), ("value:Q", "Jaccard index", ".3f"),
                            ("units:Q", "features of both"), ("expected:N", "relatives")),
    )  # fmt: skip
    text = "Share of features that two languages have in common; the table below holds the same figures."
    layers = charts.cells(base, "similarity", charts.ramp(frame))
    return alt.layer(*layers, name="similarity", description=text).properties(width=alt.Step(40), height=alt.Step(24))


def table(frame: pl.DataFrame, languages: list[str]) -> Table:
    """The pairs of languages that have most features in common."""
    order = pl.Enum(languages)
    first, second = pl.col("language").cast(order), pl.col("other").cast(order)
    pairs = frame.drop_nulls("value").filter(first < second).sort(-pl.col("value").round(3), first, second)
    columns = {
        "language": pairs["language"],
        "and": pairs["other"],
        "Jaccard index": figures(pairs["value"], 3),
        "features of both": figures(pairs["units"]),
        "relatives": pairs["expected"].fill_null(NONE),
    }
    caption = "Features that two languages have in common"
    return Table.of(caption, columns, labels=2, folded="Table: features in common, by pair")


def shared_table(inputs: ReportInputs) -> Table:
    """How many features belong to how many languages."""
    counts = range(1, len(inputs.languages) + 1)
    features = [inputs.figure("score", f"shared_by/{count}") for count in counts]
    caption, folded = (
        "Features by the number of languages that share them",
        "Table: features by the number of languages that share them",
    )
    return Table.of(caption, {"languages": map(str, counts), "features": figures(features)}, folded=folded)
