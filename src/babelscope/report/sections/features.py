"""Section `features`: how many features each language has in each layer."""

from dataclasses import replace

import altair as alt
import polars as pl

from babelscope.report import charts
from babelscope.report.numbers import NONE, percent, significant
from babelscope.report.parts import Picture, ReportInputs, Section, Table, figures, prose

SHOWN_PER_LANGUAGE = 10


def section(inputs: ReportInputs) -> Section:
    """Features by language and layer, and the first ones of each language."""
    members = inputs.members
    counted = "here only latents with a single such language count"
    if members > 1:
        counted = f"here\nonly latents with exactly {members} such languages count, each under all of them"
    caption = prose(
        """<p>A cell counts the latents of one layer’s SAE that belong to the language of its row; 0 means that none passed the
thresholds, not that the model lacks the language. The line below adds up all languages: where it rises, more of the
latents are {specific}.</p>
<p>A latent is a candidate if it fires in enough texts and on enough tokens of some language (<code>score.example_rate</code>,
<code>score.token_rate</code>). It belongs to the languages in which it fires at least <code>score.ratio</code> times as often
as in the one where it fires most; it may fire in further ones below that; {counted}. Few features with high
probability can matter more than many weak ones: see the ablation.</p>""",
        specific=specific(inputs),
        counted=counted,
    )
    link = prose(
        """<p>Each of them with its texts, its tokens and its effect: <a href="features.html">the features, one by one</a>.</p>"""
    )
    picture = Picture("features", "Features per language and layer", chart(counts(inputs)), [caption])
    title = "Where the features of each language sit"
    return Section("features", "Features", title, [picture, link, counts_table(inputs), top_features(inputs)])


def specific(inputs: ReportInputs) -> str:
    """What the features are: an adjective."""
    return "language-specific" if inputs.members == 1 else f"shared by exactly {inputs.members} languages"


def features(inputs: ReportInputs) -> pl.DataFrame:
    """The SAE features of the languages and hookpoints that params.yaml lists, by language and rank."""
    languages = pl.Enum(inputs.languages)
    return (
        inputs.features.filter(
            pl.col("kind") == "sae",
            pl.col("unit").is_not_null(),
            pl.col("language").is_in(inputs.languages),
            pl.col("hookpoint").is_in(inputs.hookpoints),
        )
        .with_columns(pl.col("language").cast(languages))
        .sort("language", "rank", "hookpoint", "unit")
        .with_columns(pl.col("language").cast(pl.String))
    )


def found(inputs: ReportInputs) -> int:
    """How many features there are; one that several languages share counts once."""
    return features(inputs).select("hookpoint", "unit").unique().height


def counts(inputs: ReportInputs) -> pl.DataFrame:
    """`language`, `hookpoint`, `layer` (label), `value` (features): the whole grid, 0 where there is no feature."""
    owned = features(inputs).group_by("language", "hookpoint").agg(value=pl.len().cast(pl.Int64))
    grid = inputs.grid().join(owned, on=["language", "hookpoint"], how="left", maintain_order="left")
    return grid.with_columns(pl.col("value").fill_null(0))


def chart(frame: pl.DataFrame) -> alt.VConcatChart:
    """`counts` as a heat map; below it the sums over all languages."""
    totals = frame.group_by("layer", "hookpoint", maintain_order=True).agg(pl.col("value").sum())
    text = "Features of each language in each layer; the table below holds the same figures."
    cells = charts.heat_map(frame, name="features", title="features", decimals=0, description=text)
    base = alt.Chart(charts.data(totals)).encode(
        x=charts.bands("layer", totals["layer"], title="layer"),
        y=alt.Y("value:Q", axis=alt.Axis(title="all languages", tickCount=3), scale=alt.Scale(zero=True, nice=True)),
        tooltip=charts.tips("hookpoint:N", ("value:Q", "features")),
    )
    sums = alt.layer(
        base.mark_area(style="area"),
        base.mark_line(style="own", strokeWidth=2),
        base.mark_point(style="own", size=36, filled=True, opacity=1),
        base.mark_text(style="halo", dy=-11, aria=False).encode(text="value:Q"),
        base.mark_text(style="value", dy=-11, aria=False).encode(text="value:Q"),
    ).properties(width=alt.Step(42), height=90)
    return charts.below(cells, sums, description=text)


def counts_table(inputs: ReportInputs) -> Table:
    """Features per language and hookpoint, with sums, and the effective number of languages that they fire in."""
    frame, names = counts(inputs), inputs.languages
    table = Table.grid("Features per language and hookpoint", frame, 0, "Table: features per language and layer")
    sums, of_layer = (
        frame.group_by(key, maintain_order=True).agg(pl.col("value").sum())["value"]
        for key in ("language", "hookpoint")
    )
    effective = [inputs.figure("score", f"effective_languages{end}") for end in (*(f"/{name}" for name in names), "")]
    total = ["all", *figures(of_layer)]
    ends = zip(figures([*sums, found(inputs)]), figures(effective, 2), strict=True)
    rows = [[*row, *end] for row, end in zip([*table.rows, total], ends, strict=True)]
    return replace(table, head=[*table.head, "all", "effective languages"], rows=rows)


def top_features(inputs: ReportInputs) -> Table:
    """The first features of every language, in rank order."""
    languages = pl.DataFrame({"language": inputs.languages})
    first = features(inputs).group_by("language", maintain_order=True).head(SHOWN_PER_LANGUAGE)
    frame = languages.join(first, on="language", how="left", maintain_order="left_right")
    known = "monolinguality" in frame.columns
    columns = {
        "language": frame["language"],
        "hookpoint": frame["hookpoint"].fill_null("no feature"),
        "unit": [NONE if unit is None else str(unit) for unit in frame["unit"]],
        "rank": figures(frame["rank"]),
        "fires on (tokens)": map(percent, frame["probability"]),
        "entropy (nats)": figures(frame["entropy"], 3),
        "monolinguality": map(significant, frame["monolinguality"] if known else [None] * len(frame)),
    }
    caption = f"The first {SHOWN_PER_LANGUAGE} features of each language by rank"
    return Table.of(caption, columns, labels=2, folded="Table: the first features of each language")
