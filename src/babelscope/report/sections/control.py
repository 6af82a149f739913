"""Each language's own features against random ones that fire as often on it."""

from typing import Any

import altair as alt
import polars as pl
from markupsafe import Markup

from babelscope.report import charts
from babelscope.report.parts import Picture, ReportInputs, Table, figures, intervals, prose
from babelscope.report.sections.ablation import method


def blocks(inputs: ReportInputs) -> list[Markup | Table | Picture]:
    """A part of the section `own`; nothing if there is no control."""
    frame = against_control(inputs)
    if frame.is_empty():
        return []
    caption = prose(
        """<p>Circle: what a language’s own features cost it, less what random ones cost it that fire as often. Diamond: the same after
what each does to the other languages is taken off (own − others, less the random ones’ own − others): random features may
hurt a language as much, but then they hurt others, too. Lines: 95&nbsp;% intervals over texts and draws. Evidence for a language is a line
that lies to the right of 0.</p>"""
    )
    heading = prose("""<h3 id="control">More than random features that fire as often?</h3>""")
    return [heading, Picture("control", "Own features against random ones", chart(frame), [caption]), table(frame)]


def against_control(inputs: ReportInputs) -> pl.DataFrame:
    """The differences between own and random features.

    Returns
    -------
    One row per language in the order of params.yaml and `question`: `language`, `question` ("own" or "selective"),
    `value`, `low`, `high` (95 %), nats/token; null if the language has no control. Empty without any.
    """
    if inputs.control is None or inputs.control.is_empty():
        return pl.DataFrame()
    rows = inputs.control.filter(pl.col("method") == method(inputs))
    parts = [
        rows.select("language", question=pl.lit(question), value=name, low=f"{name}_low", high=f"{name}_high")
        for question, name in (("own", "excess"), ("selective", "contrast"))
    ]
    questions = pl.DataFrame({"question": ["own", "selective"]})
    grid = pl.DataFrame({"language": inputs.languages}).join(questions, how="cross", maintain_order="left_right")
    return grid.join(pl.concat(parts), on=["language", "question"], how="left", maintain_order="left")


def chart(frame: pl.DataFrame) -> alt.LayerChart:
    """Two intervals per language about a line at 0: own - control, and the same beyond what it costs others."""
    base = alt.Chart(charts.data(frame)).encode(
        y=alt.Y("language:N", sort=frame["language"].unique(maintain_order=True).to_list(), title=None),
        tooltip=charts.tips("language:N", ("value:Q", "difference", charts.SIGNED), *charts.ends()),
    )
    axis = alt.Axis(title="more than random features, nats/token", grid=True, tickCount=5)
    layers = [alt.Chart(alt.Data(values=[{"zero": 0}])).mark_rule(strokeWidth=1).encode(x="zero:Q")]
    marks: list[tuple[str, str, Any, int]] = [("own", "own", "circle", -5), ("selective", "others", "diamond", 5)]
    for question, style, shape, offset in marks:
        rows = base.transform_filter(f"datum.question == '{question}'")
        line = rows.mark_rule(style=style, strokeWidth=1.5, yOffset=offset)
        point = rows.mark_point(style=style, shape=shape, filled=True, size=48, opacity=1, yOffset=offset)
        layers += [line.encode(x=alt.X("low:Q", axis=axis), x2="high:Q"), point.encode(x="value:Q")]
    text = "Own features against random ones that fire as often; the table below holds the figures."
    return alt.layer(*layers, description=text).properties(width=320, height=alt.Step(30))


def table(frame: pl.DataFrame) -> Table:
    """The two differences with their intervals."""
    own, selective = (frame.filter(question=question) for question in ("own", "selective"))
    columns = {
        "language": own["language"],
        "own - random": figures(own["value"], 4, sign=True),
        "95 %": intervals(own["low"], own["high"]),
        "own - others, less random's": figures(selective["value"], 4, sign=True),
        "95 % ": intervals(selective["low"], selective["high"]),
    }
    caption = "Against random features that fire as often, nats/token"
    return Table.of(caption, columns, folded="Table: own features against random ones")
