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
        """<p>The model generates text while the features of one language are amplified. Strength 1 adds as much as the
features contribute on average to a token of the language’s own text; strength 0 is the unchanged model. A text is a
success if fastText identifies it as that language, it does not repeat itself, and the unchanged model does not find it
improbable. NLL says how improbable that model finds the text: a high value means gibberish. Good steering has many
successes and a low NLL.</p>
<p>With the best strength for each language, {success} of the texts succeed; without steering, {unsteered} do. The best
strength was chosen on the same prompts, so the result is exploratory.</p>""",
        success=percent(inputs.figure("steer", "success")),
        unsteered=percent(inputs.figure("steer", "success_unsteered")),
    )
    picture = Picture("steering", "Success and NLL by language and strength", chart(frame), [caption])
    return Section("steering", "Steering", "Making the model write a language", [picture, table(frame)])


def steering(inputs: ReportInputs) -> pl.DataFrame:
    """Means over the texts of each language and strength; empty without generated text.

    The columns are `language`, `strength` (0 is the unsteered model, whose text is the same for all languages),
    `success` (share of the texts), `nll` (nats/token under the unsteered model) and `distinct_2`.
    """
    if inputs.generations is None or inputs.generations.is_empty():
        return pl.DataFrame()
    rows = inputs.generations.filter(pl.col("control").is_null())
    means = [pl.col("success").mean(), pl.col("nll").mean(), pl.col("distinct_2").mean()]
    result = rows.filter(pl.col("language").is_in(inputs.languages)).group_by("language", "strength").agg(means)
    nll, distinct = rows.filter(pl.col("language").is_null()).select(means[1:]).row(0)
    if nll is not None:
        success = [inputs.figure("steer", f"success_unsteered/{name}") for name in inputs.languages]
        unsteered = {"language": inputs.languages, "strength": 0.0, "success": success, "nll": nll}
        result = pl.concat([pl.DataFrame(unsteered | {"distinct_2": distinct}, schema=result.schema), result])
    return result.sort(inputs.order("language"), "strength")


def chart(frame: pl.DataFrame) -> alt.HConcatChart:
    """Success and NLL per language and strength, and their means over the languages as curves."""
    labelled = frame.with_columns(pl.Series("strength", [f"{value:g}" for value in frame["strength"]]))
    means = labelled.group_by("strength", maintain_order=True).agg(pl.col("success", "nll").mean())
    columns = []
    for key, title, decimals in (("success", "share of successes", 2), ("nll", "NLL, nats/token", 1)):
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
    text = "Success and NLL of steered text by strength; the table below holds the same figures."
    return charts.beside(*columns, description=text)


def table(frame: pl.DataFrame) -> Table:
    """`steering` as text."""
    columns = {
        "language": frame["language"], "strength": map(significant, frame["strength"]),
        "success": map(percent, frame["success"]), "NLL (nats/token)": figures(frame["nll"], 2),
        "distinct bigrams": figures(frame["distinct_2"], 2),
    }  # fmt: skip
    text = "Steered text; strength 0 is the unchanged model"
    return Table.of(text, columns, folded="steered text per language and strength")
