"""Section `ablation`: the change of every language's NLL when one language's features are removed."""

import math

import altair as alt
import polars as pl

from babelscope.config.schema import primary_method
from babelscope.report import charts
from babelscope.report.numbers import plain
from babelscope.report.parts import Picture, ReportInputs, Section, Table, prose


def section(inputs: ReportInputs) -> Section:
    """The matrix dNLL[ablated, evaluated]."""
    caption = prose(
        """<p>Each row removes one language’s features; each column is the language whose held-out text is then read. The figure is
how much worse the model predicts it, in nats per token (0.1 is about 10&nbsp;% more perplexity). If the features matter
for that language alone, the outlined diagonal is large and the rest is 0.</p>
<p>Bold: the largest figure of its row. It is on the diagonal in {rows} rows (and the largest of its column in
{columns} columns); the 95&nbsp;% interval of the diagonal lies above 0 in {rows_above_zero} rows. An empty row was not run. Hover or tap a cell for the exact figure, its 95&nbsp;% bootstrap
interval over texts, and the tokens behind it. Method: <code>{method}</code> ablation at all hookpoints together; the SAE’s
reconstruction error stays in place, so removing nothing changes nothing.</p>""",
        **{key: of_languages(inputs, key) for key in ("rows", "columns", "rows_above_zero")},
        method=method(inputs),
    )
    picture = Picture("ablation", "Ablation matrix", chart(matrix(inputs), inputs.languages), [caption])
    return Section("ablation", "Ablation", "What removing them does", [picture, table(inputs)])


def of_languages(inputs: ReportInputs, key: str) -> str:
    """A figure of `metrics/ablate.json` that counts languages, as "3 of 15"."""
    return f"{plain(inputs.figure('ablate', key))} of {len(inputs.languages)}"


def method(inputs: ReportInputs) -> str:
    """The method that the page shows: that of the unprefixed figures in `metrics/ablate.json`."""
    return str(inputs.figure("ablate", "primary_method") or primary_method(sorted(set(inputs.nll["method"]) - {None})))


def of_method(inputs: ReportInputs, frame: pl.DataFrame) -> pl.DataFrame:
    """The rows of `method`; NaN becomes null."""
    frame = frame.with_columns(pl.col("delta", "low", "high").cast(pl.Float64).fill_nan(None))
    return frame.filter(pl.col("method") == method(inputs))


def matrix(inputs: ReportInputs) -> pl.DataFrame:
    """The cells of dNLL[ablated, evaluated], in nats/token, for the real sets of features.

    Returns
    -------
    `ablated`, `evaluated`, `value` (dNLL), `low`, `high` (95 %), `tokens`, `own` (on the diagonal), `largest` (of its
    row), in the order of params.yaml; a language that was not ablated has no row.
    """
    languages = pl.Enum(inputs.languages)
    cells = of_method(inputs, inputs.nll).filter(
        pl.col("control").is_null(),
        pl.col("ablated").is_in(inputs.languages),
        pl.col("evaluated").is_in(inputs.languages),
    )
    return (
        cells.select(pl.col("ablated", "evaluated").cast(languages), "tokens", "low", "high", value="delta")
        .sort("ablated", "evaluated")
        .with_columns(pl.col("ablated", "evaluated").cast(pl.String))
        .with_columns(
            own=pl.col("ablated") == pl.col("evaluated"),
            # A row of zeros (nothing was ablated) has no largest cell.
            largest=(pl.col("value") == pl.col("value").max().over("ablated")) & (pl.col("value") > 0),
        )
    )


def chart(frame: pl.DataFrame, languages: list[str]) -> alt.LayerChart:
    """`matrix` as a heat map; one of `languages` without a row in it is an empty row."""
    largest = max((abs(v) for v in frame["value"].drop_nulls() if math.isfinite(v)), default=0.0) or 1.0
    title = "ΔNLL (nats/token)"
    base = alt.Chart(charts.data(charts.written(frame, 2 if largest >= 0.1 else 3))).encode(
        x=alt.X("evaluated:N", scale=alt.Scale(domain=languages),
                axis=alt.Axis(title="evaluated on", orient="top", labelAngle=0, titleAnchor="start")),
        y=alt.Y("ablated:N", scale=alt.Scale(domain=languages), title="features removed"),
        tooltip=charts.tips(("ablated:N", "removed"), ("evaluated:N", "evaluated"), ("value:Q", title, charts.SIGNED),
                            *charts.ends(), ("tokens:Q", "tokens", ",")),
    )  # fmt: skip
    colour = alt.Color(
        "value:Q",
        scale=alt.Scale(range="diverging", domain=[-largest, largest], domainMid=0, interpolate="lab"),
        legend=alt.Legend(title="ΔNLL, nats/token (0: no change)"),
    )
    frames = base.mark_rect(style="frame", fill="transparent", strokeWidth=1.6, aria=False)
    texts = base.encode(text="text:N")
    inked = texts.encode(color=charts.ink("ablation"))
    return alt.layer(
        base.mark_rect().encode(color=colour),
        frames.transform_filter("datum.own"),
        texts.mark_text(style="nothing", aria=False).transform_filter("datum.text == '0'"),
        inked.mark_text(style="value", aria=False).transform_filter("datum.text != '0' && !datum.largest"),
        inked.mark_text(style="largest", aria=False).transform_filter("datum.text != '0' && datum.largest"),
        name="ablation",
        description="Change of each language's NLL when one language's features are removed; "
        "the table below holds the same figures.",
    ).properties(width=alt.Step(40), height=alt.Step(26))


def table(inputs: ReportInputs) -> Table:
    """`matrix` with four decimals; an asterisk marks the largest of a row."""
    cells = {
        (ablated, evaluated): plain(value, 4) + ("*" if largest else "")
        for ablated, evaluated, value, largest in matrix(inputs)
        .select("ablated", "evaluated", "value", "largest")
        .rows()
    }
    languages = inputs.languages
    rows = [[row, *(cells.get((row, column), plain(None)) for column in languages)] for row in languages]
    caption = "ΔNLL in nats/token: row = features removed, column = evaluated on, * = largest of its row"
    return Table(caption, ["removed", *languages], rows, folded="Table: every cell of the matrix")
