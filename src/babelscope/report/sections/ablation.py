"""Section `ablation`: the change of every language's NLL when one language's features are removed."""

import math

import altair as alt
import polars as pl

from babelscope.config.schema import primary_method
from babelscope.report import charts
from babelscope.report.numbers import plain
from babelscope.report.parts import Picture, ReportInputs, Section, Table, browser_link, how_to_read, prose


def section(inputs: ReportInputs) -> Section:
    """The matrix dNLL[ablated, evaluated]."""
    caption = how_to_read(
        """<p>Each row removes the features of one language; each column evaluates held-out text of one language. The
number in a cell is the change in negative log-likelihood (ΔNLL) in nats per token: how much worse the model predicts
that text (0.1 is about 10&nbsp;% more perplexity). If the features of a language matter to that language alone, the
outlined diagonal cell is large and the rest of the row is close to 0.</p>
<p>The largest number of each row is bold. An empty row was not measured. Point at a cell, or tap it, to see the exact
number, its 95&nbsp;% bootstrap interval over texts, and the number of tokens.
A click opens the features of the language in the feature browser.</p>
<p>The features of all hookpoints are removed together, by the method <code>{method}</code>. The reconstruction error of
the SAE is kept, so that removing no feature changes nothing.</p>""",
        method=method(inputs),
    )
    result = prose(
        """<p>The language whose features are removed is the one whose loss changes most in {rows} cases, and no other
language’s features change its loss more in {columns}. The 95&nbsp;% interval of its own change is above 0 in
{rows_above_zero}.</p>""",
        **{key: of_languages(inputs, key) for key in ("rows", "columns", "rows_above_zero")},
    )
    picture = Picture("ablation", "Ablation matrix", chart(matrix(inputs), inputs.languages), [result, caption])
    return Section("ablation", "Ablation", finding(inputs), [picture, table(inputs)])


def finding(inputs: ReportInputs) -> str:
    """In how many rows the diagonal is largest."""
    if inputs.figure("ablate", "rows") is None:
        return "What the removal of a language’s features does"
    return f"Removing a language’s features hurts that language most in {of_languages(inputs, 'rows')} cases"


def of_languages(inputs: ReportInputs, key: str) -> str:
    """A figure of `metrics/ablate.json` that counts languages, as "3 of 15"."""
    return f"{plain(inputs.figure('ablate', key))} of {len(inputs.languages)}"


def method(inputs: ReportInputs) -> str:
    """The method that the page shows: that of the unprefixed figures in `metrics/ablate.json`."""
    return str(inputs.figure("ablate", "primary_method") or primary_method(sorted(set(inputs.nll["method"]) - {None})))


def of_method(inputs: ReportInputs, frame: pl.DataFrame) -> pl.DataFrame:
    """The rows of `method` that ablate one of the languages and evaluate one; NaN becomes null."""
    frame = frame.with_columns(pl.col("delta", "low", "high").cast(pl.Float64).fill_nan(None))
    names = inputs.languages
    return frame.filter(pl.col("ablated").is_in(names), pl.col("evaluated").is_in(names), method=method(inputs))


def matrix(inputs: ReportInputs) -> pl.DataFrame:
    """The cells of dNLL[ablated, evaluated], in nats/token; a language that was not ablated has none.

    The columns are `ablated`, `evaluated`, `tokens`, `low`, `high` (95 %), `value` (dNLL), `href` (link), `own` (on the
    diagonal) and `largest` (of its row).
    """
    cells = of_method(inputs, inputs.nll).filter(pl.col("control").is_null())
    cells = cells.sort(inputs.order("ablated"), inputs.order("evaluated"))
    links = {name: browser_link(name) for name in inputs.languages}
    return cells.select("ablated", "evaluated", "tokens", "low", "high", value="delta").with_columns(
        href=pl.col("ablated").replace_strict(links, return_dtype=pl.String),
        own=pl.col("ablated") == pl.col("evaluated"),
        # A row of zeros (nothing was ablated) has no largest cell.
        largest=(pl.col("value") == pl.col("value").max().over("ablated")) & (pl.col("value") > 0),
    )


def chart(frame: pl.DataFrame, languages: list[str]) -> alt.LayerChart:
    """`matrix` as a heat map; one of `languages` without a row in it is an empty row."""
    largest = max((abs(v) for v in frame["value"].drop_nulls() if math.isfinite(v)), default=0.0) or 1.0
    domain, title = alt.Scale(domain=languages), "ΔNLL (nats/token)"
    base = alt.Chart(charts.data(charts.written(frame, 2 if largest >= 0.1 else 3))).encode(
        x=alt.X("evaluated:N", scale=domain,
                axis=alt.Axis(title="evaluated on", orient="top", labelAngle=0, titleAnchor="start")),
        y=alt.Y("ablated:N", scale=domain, axis=charts.languages_axis(languages, title="features removed")),
        href="href:N",
        tooltip=charts.tips(("ablated:N", "removed"), ("evaluated:N", "evaluated"), ("value:Q", title, charts.SIGNED),
                            *charts.ends(), ("tokens:Q", "tokens", ",")),
    )  # fmt: skip
    scale = alt.Scale(range="diverging", domain=[-largest, largest], domainMid=0, interpolate="lab")
    colour = alt.Color("value:Q", scale=scale, legend=alt.Legend(title="ΔNLL, nats/token (0: no change)"))
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
    ).properties(width=alt.Step(43), height=alt.Step(28))


def table(inputs: ReportInputs) -> Table:
    """`matrix` with four decimals; an asterisk marks the largest of a row."""
    cells = {
        (row["ablated"], row["evaluated"]): plain(row["value"], 4) + ("*" if row["largest"] else "")
        for row in matrix(inputs).iter_rows(named=True)
    }
    names = inputs.languages
    rows = [[row, *(cells.get((row, column), plain(None)) for column in names)] for row in names]
    caption = "ΔNLL in nats/token: row = features removed, column = evaluated on, * = largest of its row"
    return Table(caption, ["removed", *names], rows, folded="every cell of the matrix")
