"""Section `script`: which features still fire if their language is written in Latin letters."""

import altair as alt
import polars as pl

from babelscope.report import charts
from babelscope.report.numbers import NONE, percent, plain
from babelscope.report.parts import Picture, ReportInputs, Section, Table, figures, how_to_read, prose


def section(inputs: ReportInputs) -> Section | None:
    """The share of the features that still fire; None if the stage measured nothing."""
    frame = by_language(inputs)
    if frame.is_empty():
        return None
    tested, bound = (inputs.figure("script", key) for key in ("tested", "script_bound"))
    result = prose(
        """<p>{bound} of the {tested} features of languages in another script than the Latin one are
<em>script-bound</em>: they do not still fire if the same texts are romanised. There is a verdict only for languages in
which romanising replaces at least half of the letters.</p>""",
        bound=plain(bound),
        tested=plain(tested),
    )
    reading = how_to_read(
        """<p>The same held-out texts are shown to the model as they are, in Latin letters (romanised), and with their
words in random order. A feature still fires if it fires at half its usual rate or more, as a share of tokens. Bar: the
share of a language’s features that still fire on the romanised texts. Diamond: on the shuffled ones. The rules were
fixed before the results were known. Romanised text is rare in what models read, so a feature may also fall silent
because the model does not recognise its language any more;
a feature that still fires does not depend on the script.</p>"""
    )
    title = "Language or script"
    if tested:
        title = f"{percent((tested - bound) / tested, 0)} of the features of other scripts still fire in Latin letters"
    picture = Picture(
        "script", "Features that still fire on romanised and on shuffled texts", chart(frame), [result, reading]
    )
    return Section("script", "Script", title, [picture, table(frame)])


def by_language(inputs: ReportInputs) -> pl.DataFrame:
    """One row per language with measured features, in the order of params.yaml.

    `language`, `features`, `replaced`, `romanised` and `shuffled` (shares that still fire), `bound` (features, null:
    no verdict), `own_original` and `own_romanised` (nats/token, null: not measured).
    """
    if inputs.script is None or inputs.script.is_empty():
        return pl.DataFrame()
    rows = inputs.script.filter(pl.col("language").is_in(inputs.languages))
    verdict = pl.when(pl.col("script_bound").is_not_null().any()).then(pl.col("script_bound").sum())
    found = rows.group_by("language").agg(features=pl.len(), bound=verdict).sort(inputs.order("language"))
    keys = {
        "replaced": "replaced", "romanised": "still_romanised", "shuffled": "still_shuffled",
        "own_original": "own_original", "own_romanised": "own_romanised",
    }  # fmt: skip
    return found.with_columns(
        pl.Series(name, inputs.each("script", key, found["language"]), dtype=pl.Float64) for name, key in keys.items()
    )


def chart(frame: pl.DataFrame) -> alt.VConcatChart:
    """Points: the shares that still fire."""
    base = charts.by_language(
        frame, "features:Q", ("romanised:Q", "still fire, romanised", ".0%"),
        ("shuffled:Q", "still fire, shuffled", ".0%"), ("replaced:Q", "letters replaced", ".0%"),
    )  # fmt: skip
    axis = alt.Axis(title="features that still fire", format="%", grid=True, tickCount=5)
    x = alt.X("romanised:Q", axis=axis, scale=alt.Scale(domain=[0, 1]))
    bars = base.mark_bar(style="own", height=9, yOffset=-5).encode(x=x)
    points = base.mark_point(style="others", shape="diamond", filled=True, size=44, yOffset=6).encode(x="shuffled:Q")
    entries = [("own", "square", "on romanised texts"), ("others", "diamond", "on shuffled texts")]
    text = "Share of each language's features that still fire; the table holds the same figures."
    plot = alt.layer(bars, points).properties(width=480, height=alt.Step(28))
    return charts.below(plot, charts.legend(*entries), description=text)


def table(frame: pl.DataFrame) -> Table:
    """`by_language`."""
    columns = {
        "language": frame["language"], "features": figures(frame["features"]),
        "letters replaced": map(percent, frame["replaced"]),
        "still fire, romanised": map(percent, frame["romanised"]),
        "still fire, shuffled": map(percent, frame["shuffled"]),
        "script-bound": [NONE if value is None else plain(value) for value in frame["bound"]],
        "ΔNLL of itself without its features": figures(frame["own_original"], 3, sign=True),
        "the same, romanised": figures(frame["own_romanised"], 3, sign=True),
    }  # fmt: skip
    text = "features on romanised and on shuffled texts"
    return Table.of(f"{text.capitalize()} (ΔNLL in nats/token)", columns, folded=text)
