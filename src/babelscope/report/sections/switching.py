"""Section `switching`: a language's features where a sentence switches to it, and what removing them does."""

import altair as alt
import polars as pl

from babelscope.report import charts
from babelscope.report.numbers import plain
from babelscope.report.parts import Picture, ReportInputs, Section, Table, figures, how_to_read, intervals, prose


def section(inputs: ReportInputs) -> Section | None:
    """Pre-activations around a switch, and the table of pairs; None if `switching.groups` is 0."""
    frame = profile(inputs)
    if frame.is_empty():
        return None
    found = {key: plain(inputs.figure("switching", key), 2, sign=True) for key in ("cost", "effect", "stayed", "host")}
    counts = {key: plain(inputs.figure("switching", key)) for key in ("pairs", "pairs_above", "groups")}
    rows, title, result = pairs(inputs), "A language’s features where a sentence switches to it", []
    if rows.rows:
        title = f"Without its features, the switch to a language costs {found['effect']} nats per token more"
        text = """<p>Going on in another language costs {cost} nats per token. If the features of that language are
removed at the switch, it costs {effect} more on average, and more than 0 (95&nbsp;% interval) in {pairs_above} of
{pairs} pairs of languages. The NLL of going on in the first language changes by {stayed}. Without the features of the
first language, the NLL of the second part changes by {host}.</p>"""
        result = [prose(text, **found, **counts)]
    reading = how_to_read(
        """<p>The first part of a held-out text is continued by the second part of its translation, for every pair of
languages in {groups} parallel texts. Position 0 is the first token of the second language. Circle: mean
pre-activation of the features of the language to which the sentence switches. Diamond: of the language of the first
part. Cross: of a language’s features in its own text, which does not switch. 1 is a feature’s mean activation where it
fires on its language.</p>""",
        **counts,
    )
    label = "Pre-activations of the features of two languages around a switch from one to the other"
    picture = Picture("switching", label, chart(frame), [*result, reading])
    return Section("switching", "Switching", title, [picture, *([rows] if rows.rows else [])])


def profile(inputs: ReportInputs) -> pl.DataFrame:
    """`position`, `intruder`, `host`, `alone`: means over the pairs of languages and the hookpoints."""
    if inputs.switch_positions is None or inputs.switch_positions.is_empty():
        return pl.DataFrame()
    rows = inputs.switch_positions.filter(pl.all_horizontal(pl.col("language", "other").is_in(inputs.languages)))
    switches = pl.col("language") != pl.col("other")
    return (
        rows.group_by("position")
        .agg(pl.col("intruder", "host").filter(switches).mean(), alone=pl.col("host").filter(~switches).mean())
        .sort("position")
    )


def chart(frame: pl.DataFrame) -> alt.VConcatChart:
    """`profile` as three lines."""
    lines = [
        ("intruder", "own", "circle", "of the language switched to"),
        ("host", "others", "diamond", "of the first language"),
        ("alone", "random", "cross", "in the language’s own text"),
    ]
    base = alt.Chart(charts.data(frame)).encode(
        x=charts.bands("position", frame["position"], title="tokens from the switch"),
        tooltip=charts.tips("position:O", *((f"{key}:Q", text, ".2f") for key, _, _, text in lines)),
    )
    axis = alt.Axis(title="relative pre-activation", tickCount=5, grid=True)
    layers = [mark for *line, _ in lines for mark in charts.curve(base, *line, axis=axis)]
    text = "Mean pre-activation of features around a switch of the language; data/switching/positions.parquet has it."
    plot = alt.layer(*layers).properties(width=alt.Step(50), height=220)
    return charts.below(plot, charts.legend(*(line[1:] for line in lines)), description=text)


def pairs(inputs: ReportInputs) -> Table:
    """The pairs of languages, those in which the removal has the largest effect first."""
    frame = inputs.switching
    assert frame is not None  # `switch_positions` comes with it
    frame = frame.filter(pl.all_horizontal(pl.col("language", "other").is_in(inputs.languages)))
    frame = frame.sort(-pl.col("effect").round(4), inputs.order("language"), inputs.order("other"))
    names = {
        "cost": "cost of the switch", "effect": "its change", "switched": "second language",
        "stayed": "first language instead", "host": "second, without the first’s features",
        "alone": "second after its own",
    }  # fmt: skip
    columns = {"from": frame["language"], "to": frame["other"], "texts": figures(frame["groups"])}
    columns |= {title: figures(frame[key], 2, sign=True) for key, title in names.items()}
    columns["95 % of its change"] = intervals(frame["effect_low"], frame["effect_high"])
    text = "Switches from one language to another, and the change of the NLL without the second’s features (nats/token)"
    return Table.of(text, columns, labels=2, folded="switches, by pair of languages")
