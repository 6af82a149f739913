"""Section `control`: each language's own features against random latents that fire as often on it."""

from typing import Any

import altair as alt
import polars as pl

from babelscope.report import charts
from babelscope.report.numbers import plain
from babelscope.report.parts import Picture, ReportInputs, Section, Table, figures, how_to_read, intervals, prose
from babelscope.report.sections.ablation import method, of_languages


def section(inputs: ReportInputs) -> Section | None:
    """The two differences to random latents; None if there is no control."""
    frame = against_control(inputs)
    if frame.is_empty():
        return None
    caption = how_to_read(
        """<p>Removing latents that fire often can hurt a language even if they have nothing to do with it. This
comparison takes that into account. Circle: the ΔNLL of a language without its own features, minus its ΔNLL without
random latents that fire as often on it. Diamond: the same comparison for the difference between the language
itself and the other languages, because random latents may hurt a language as much, but then they hurt the others, too.
Lines: 95&nbsp;% intervals over texts and draws. A line that lies entirely to the right of 0 is evidence for the
language’s own features.</p>"""
    )
    result = prose(
        """<p>A language’s own features cost it more than random latents in {above} languages. Their effect is more
selective than that of random latents in {selective}. For the other languages, the ΔNLL above shows no more than that
latents which fire often were removed.</p>
<p>One of many intervals can lie above 0 by chance. After Holm’s correction, which holds the probability of one or more
such errors among all languages at 5&nbsp;%, the two numbers are {above_holm} and {selective_holm}. The table has the
difference that these texts and draws would show in 80&nbsp;% of all experiments: “detectable”.</p>""",
        above=of_languages(inputs, "languages_above_control"),
        selective=of_languages(inputs, "languages_selective"),
        above_holm=of_languages(inputs, "languages_above_control_holm"),
        selective_holm=of_languages(inputs, "languages_selective_holm"),
    )
    text = [caption] if inputs.figure("ablate", "languages_above_control") is None else [result, caption]
    if (count := inputs.figure("ablate", "languages_with_script")) is not None:
        script = prose(
            """<p>A second control is drawn among latents that, of all other languages, fire most often in one of the
same script. Of the {count} languages that share their script, the own features cost {above} more than these latents do
({above_holm} after Holm’s correction).</p>""",
            count=plain(count),
            above=plain(inputs.figure("ablate", "languages_above_script")),
            above_holm=plain(inputs.figure("ablate", "languages_above_script_holm")),
        )
        text.insert(-1, script)
    picture = Picture("control", "Own features compared with random latents", chart(frame), text)
    return Section("control", "Random latents", finding(inputs), [picture, table(inputs, frame)])


def finding(inputs: ReportInputs) -> str:
    """In how many languages own features do more, after the correction if there is one."""
    for key, end in (("languages_above_control_holm", " (Holm)"), ("languages_above_control", "")):
        if inputs.figure("ablate", key) is not None:
            count = of_languages(inputs, key)
            return f"In {count} languages, own features matter more than random latents that fire as often{end}"
    return "Comparison with random latents"


def against_control(inputs: ReportInputs) -> pl.DataFrame:
    """The differences between own features and random latents: one row per language and question.

    The columns are `language`, `question` ("own" or "selective"), `value`, `low` and `high` (95 %), in nats/token,
    null if the language has no control. Empty without any.
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


def chart(frame: pl.DataFrame) -> alt.VConcatChart:
    """Two intervals per language about a line at 0: own - control, and the same beyond what it costs others."""
    base = charts.by_language(frame, ("value:Q", "difference", charts.SIGNED), *charts.ends())
    axis = alt.Axis(title="difference to random latents, nats/token", grid=True, tickCount=5)
    layers = [alt.Chart(alt.Data(values=[{"zero": 0}])).mark_rule(strokeWidth=1).encode(x="zero:Q")]
    marks: list[tuple[str, str, Any, int]] = [("own", "own", "circle", -5), ("selective", "others", "diamond", 5)]
    for question, style, shape, offset in marks:
        rows = base.transform_filter(f"datum.question == '{question}'")
        line = rows.mark_rule(style=style, strokeWidth=1.5, yOffset=offset)
        point = rows.mark_point(style=style, shape=shape, filled=True, size=48, opacity=1, yOffset=offset)
        layers += [line.encode(x=alt.X("low:Q", axis=axis), x2="high:Q"), point.encode(x="value:Q")]
    text = "Own features compared with random latents that fire as often; the table below holds the figures."
    entries = [("own", "circle", "loses more itself"), ("others", "diamond", "and more than the others do")]
    plot = alt.layer(*layers).properties(width=480, height=alt.Step(32))
    return charts.below(plot, charts.legend(*entries), description=text)


def table(inputs: ReportInputs, frame: pl.DataFrame) -> Table:
    """The two differences with their intervals, and the first difference that could have been detected."""
    own, selective = (frame.filter(question=question) for question in ("own", "selective"))
    columns = {
        "language": own["language"], "itself: own − random": figures(own["value"], 4, sign=True),
        "95 %": intervals(own["low"], own["high"]), "detectable": figures(inputs.each("ablate", "detectable"), 4),
        "itself − others: own − random": figures(selective["value"], 4, sign=True),
        "95 % ": intervals(selective["low"], selective["high"]),
    }  # fmt: skip
    for title, key in (
        ("random latents fire, own = 1", "control_rate"), ("ΔNLL, latents of the script", "dnll_control_script"),
        ("these fire, own = 1", "control_script_rate"),
    ):  # fmt: skip
        values = inputs.each("ablate", key)
        if any(value is not None for value in values):
            columns[title] = figures(values, 2 if key.endswith("rate") else 4, sign=not key.endswith("rate"))
    return Table.of("ΔNLL compared with random latents, nats/token", columns, folded="own features and random latents")
