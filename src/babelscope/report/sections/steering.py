"""Section `steering`: text generated with a language's features amplified."""

import altair as alt
import polars as pl

from babelscope.report import charts
from babelscope.report.numbers import percent, significant
from babelscope.report.parts import Picture, ReportInputs, Section, Table, figures, prose


def section(inputs: ReportInputs) -> Section | None:
    """Success and fluency by language and strength; None if no text was generated."""
    frame = steering(inputs)
    if frame.is_empty():
        return None
    caption = prose(
        """<p>Text is generated with a language’s features amplified; strength 1 adds what they add on average to a token of the
language’s own text, 0 is the untouched model. Success: fastText calls the text that language, and it neither repeats itself
nor is it improbable under the untouched model. NLL: how improbable; high figures are gibberish. Good steering has a high success at a low NLL.</p>
<p>At each language’s best strength {success} of the texts succeed, {unsteered} untouched. The strength was chosen on
the same prompts: take it as exploration.</p>""",
        success=percent(inputs.figure("steer", "success")),
        unsteered=percent(inputs.figure("steer", "success_unsteered")),
    )
    picture = Picture("steering", "Success and fluency by language and strength", chart(frame), [caption])
    return Section("steering", "Steering", "Do they make the model write that language?", [picture, table(frame)])


def steering(inputs: ReportInputs) -> pl.DataFrame:
    """Success and fluency of steered text, per language and strength.

    Returns
    -------
    `language`, `strength`, `success` (share of the texts that are in the language and not degenerate), `nll`
    (nats/token under the unsteered model), `distinct_2`; strength 0 is the unsteered model, whose text is the same for
    all languages. In the order of params.yaml and by strength; empty without generated text.
    """
    if inputs.generations is None or inputs.generations.is_empty():
        return pl.DataFrame()
    rows = inputs.generations.filter(pl.col("control").is_null())
    means = [pl.col("success").mean(), pl.col("nll").mean(), pl.col("distinct_2").mean()]
    result = rows.filter(pl.col("language").is_in(inputs.languages)).group_by("language", "strength").agg(means)
    nll, distinct = rows.filter(pl.col("language").is_null()).select(means[1:]).row(0)
    if nll is not None:
        success = [inputs.figure("steer", f"success_unsteered/{name}") for name in inputs.languages]
        unsteered = {
            "language": inputs.languages,
            "strength": 0.0,
            "success": success,
            "nll": nll,
            "distinct_2": distinct,
        }
        result = pl.concat([pl.DataFrame(unsteered, schema=result.schema), result])
    return result.sort(pl.col("language").cast(pl.Enum(inputs.languages)), "strength")


def chart(frame: pl.DataFrame) -> alt.HConcatChart:
    """Success and NLL per language and strength, and their means over the languages as curves."""
    labelled = frame.with_columns(pl.Series("strength", [f"{value:g}" for value in frame["strength"]]))
    means = labelled.group_by("strength", maintain_order=True).agg(pl.col("success", "nll").mean())
    columns = []
    for key, title, decimals in (
        ("success", "share in the language, not degenerate", 2),
        ("nll", "NLL, nats/token", 1),
    ):
        cells = charts.heat_map(
            labelled.with_columns(value=pl.col(key)), name=f"steer_{key}", title=title, decimals=decimals,
            description=title, axis="strength", step=46,
        ).properties(title=title)  # fmt: skip
        base = alt.Chart(charts.data(means)).encode(
            x=charts.bands("strength", means["strength"]),
            y=alt.Y(f"{key}:Q", title="mean", axis=alt.Axis(tickCount=3), scale=alt.Scale(zero=True)),
            tooltip=charts.tips("strength:O", (f"{key}:Q", title, ".3f")),
        )
        points = base.mark_point(style="own", filled=True, size=36, opacity=1)
        curve = alt.layer(base.mark_line(style="own"), points).properties(width=alt.Step(46), height=90)
        columns.append(charts.below(cells, curve))
    text = "Success and fluency of steered text by strength; the table below holds the same figures."
    return charts.beside(*columns, description=text)


def table(frame: pl.DataFrame) -> Table:
    """`steering` as text."""
    columns = {
        "language": frame["language"],
        "strength": map(significant, frame["strength"]),
        "success": map(percent, frame["success"]),
        "NLL (nats/token)": figures(frame["nll"], 2),
        "distinct-2": figures(frame["distinct_2"], 2),
    }
    caption = "Steered text; strength 0 is the unsteered model"
    return Table.of(caption, columns, folded="Table: steered text per language and strength")
