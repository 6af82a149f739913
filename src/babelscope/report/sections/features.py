"""Section `features`: how many features each language has in each layer."""

import math
from dataclasses import replace

import altair as alt
import polars as pl
from markupsafe import Markup

from babelscope.report import charts
from babelscope.report.names import name
from babelscope.report.numbers import NONE, percent, plain, significant
from babelscope.report.parts import (
    Picture,
    ReportInputs,
    Section,
    Table,
    browser_link,
    figures,
    how_to_read,
    layer_labels,
    prose,
)

SHOWN_PER_LANGUAGE = 10


def section(inputs: ReportInputs) -> Section:
    """Features by language and layer, and the first ones of each language."""
    limit = inputs.params.get("score", {}).get("max_entropy")
    random = inputs.figure("score", "features_on_random_tokens")
    caption = how_to_read(
        """<p>Each cell is the number of latents of one layer’s SAE that are features of the language in that row. A 0
means that no latent passed the thresholds; it does not mean that the model lacks the language. The line below the cells
is the sum over all languages.</p>
<p>A latent is considered if it fires in enough texts and on enough tokens of at least one language
(<code>score.example_rate</code>, <code>score.token_rate</code>). It belongs to each language in which its firing rate
is at least <code>score.ratio</code> times its highest firing rate. Only latents that belong to exactly {members}{limit}
are counted{random}. Such a latent may also fire in other languages, but at a lower rate. A few features that fire often
can matter more than many that fire rarely: the ablation below measures their effect. A click on a cell opens its
features in the feature browser.</p>""",
        members="one language" if inputs.members == 1 else f"{inputs.members} languages",
        limit="" if limit is None else f" and have at most {math.exp(limit):.2f} effective languages",
        random="" if random is None else f", without {plain(random)} that fire on random tokens as on their language",
    )
    link = prose(
        """<p>The <a href="features.html">feature browser</a> shows every feature and where it fires, and has a page for
every language and layer: {links}.</p>""",
        links=Markup(", ").join(
            Markup('<a href="{}">{}</a>').format(browser_link(language), name(language))
            for language in inputs.languages
        ),
    )
    effective = inputs.figure("score", "effective_languages")
    specific = prose(
        """<p>A feature of one language may still fire on others. Seen as a distribution over languages, its firing
rates are as spread as over {mean} languages on average (exp of the mean entropy; 1 would be perfectly specific,
{count} not at all) and {median} in the median.</p>""",
        mean=plain(effective, 2), count=len(inputs.languages),
        median=plain(inputs.figure("score", "effective_languages_median"), 2),
    )  # fmt: skip
    text = [link, caption] if effective is None else [specific, link, caption]
    picture = Picture("features", "Features per language and layer", chart(counts(inputs)), text)
    return Section("features", "Features", finding(inputs), [picture, counts_table(inputs), top_features(inputs)])


def finding(inputs: ReportInputs) -> str:
    """How many languages have features, and where most of them are."""
    layers, total, n = sums(inputs, "hookpoint"), found(inputs), len(inputs.languages)
    if not total:
        return "No language has features that pass the thresholds"
    owners = features(inputs)["language"].n_unique()
    most = layers.sort("value", descending=True, maintain_order=True).row(0, named=True)
    label = layer_labels(inputs.hookpoints)[most["hookpoint"]]
    where = f"; layer {label} has most, {plain(most['value'])} of {plain(total)}" if len(layers) > 1 else ""
    return f"{owners} of {n} languages have features of their own{where}"


def kind(inputs: ReportInputs) -> str:
    """What the features are called."""
    if inputs.members == 1:
        return "language-specific features"
    return f"features shared by exactly {inputs.members} languages"


def features(inputs: ReportInputs) -> pl.DataFrame:
    """The SAE features of the languages and hookpoints that params.yaml lists, by language and rank."""
    listed = pl.col("language").is_in(inputs.languages) & pl.col("hookpoint").is_in(inputs.hookpoints)
    rows = inputs.features.filter(listed & (pl.col("kind") == "sae") & pl.col("unit").is_not_null())
    return rows.sort(inputs.order("language"), "rank", "hookpoint", "unit")


def found(inputs: ReportInputs) -> int:
    """How many features there are; one that several languages share counts once."""
    return features(inputs).select("hookpoint", "unit").n_unique()


def counts(inputs: ReportInputs) -> pl.DataFrame:
    """`ReportInputs.grid` with `value`, the number of features."""
    owned = features(inputs).group_by("language", "hookpoint").agg(value=pl.len().cast(pl.Int64))
    grid = inputs.grid().join(owned, on=["language", "hookpoint"], how="left", maintain_order="left")
    return grid.with_columns(pl.col("value").fill_null(0))


def sums(inputs: ReportInputs, key: str) -> pl.DataFrame:
    """`counts` summed up by "language" or "hookpoint", in the order of params.yaml."""
    return counts(inputs).group_by(key, maintain_order=True).agg(pl.col("value").sum())


def chart(frame: pl.DataFrame) -> alt.VConcatChart:
    """`counts` as a heat map; below it the sums over all languages."""
    totals = frame.group_by("layer", "hookpoint", maintain_order=True).agg(pl.col("value").sum())
    links = [browser_link(hookpoint=hookpoint) for hookpoint in totals["hookpoint"]]
    totals = totals.with_columns(href=pl.Series(links, dtype=pl.String))
    text = "Features of each language in each layer; the table below holds the same figures."
    cells = charts.heat_map(frame, name="features", title="features", decimals=0, description=text)
    base = alt.Chart(charts.data(totals)).encode(
        x=charts.bands("layer", totals["layer"], title="layer"),
        y=alt.Y("value:Q", axis=alt.Axis(title="all languages", tickCount=3), scale=alt.Scale(zero=True, nice=True)),
        tooltip=charts.tips("hookpoint:N", ("value:Q", "features")),
    )
    texts = [base.mark_text(style=style, dy=-11, aria=False).encode(text="value:Q") for style in ("halo", "value")]
    points = base.mark_point(style="own", size=36, filled=True, opacity=1).encode(href="href:N")
    lines = base.mark_line(style="own", strokeWidth=2), points
    below = alt.layer(base.mark_area(style="area"), *lines, *texts).properties(
        width=alt.Step(charts.column_width(len(totals))), height=110
    )
    return charts.below(cells, below, description=text)


def script_column(inputs: ReportInputs, frame: pl.DataFrame) -> dict[str, list[str]]:
    """Whether each feature of `frame` is script-bound, as a column; none if stage `script` measured nothing."""
    if inputs.script is None or inputs.script.is_empty():
        return {}
    verdict = dict(zip(inputs.script.select("hookpoint", "unit", "language").rows(), inputs.script["script_bound"],
                       strict=True))  # fmt: skip
    words = {True: "yes", False: "no", None: NONE}
    return {"script-bound": [words[verdict.get(key)] for key in frame.select("hookpoint", "unit", "language").rows()]}


def counts_table(inputs: ReportInputs) -> Table:
    """`counts` with sums, and the effective number of languages in which the features fire."""
    ends = [*(f"/{name}" for name in inputs.languages), ""]
    effective = figures((inputs.figure("score", f"effective_languages{end}") for end in ends), 2)
    totals = figures([*sums(inputs, "language")["value"], found(inputs)])
    table = Table.grid("Features per language and hookpoint", counts(inputs), 0, "features per language and layer")
    rows = [*table.rows, ["all", *figures(sums(inputs, "hookpoint")["value"])]]
    rows = [[*row, *end] for row, *end in zip(rows, totals, effective, strict=True)]
    return replace(table, head=[*table.head, "all", "effective languages"], rows=rows)


def top_features(inputs: ReportInputs) -> Table:
    """The first features of every language, in rank order."""
    first = features(inputs).group_by("language", maintain_order=True).head(SHOWN_PER_LANGUAGE)
    languages = pl.DataFrame({"language": inputs.languages})
    frame = languages.join(first, on="language", how="left", maintain_order="left_right")
    columns = {
        "language": frame["language"], "hookpoint": frame["hookpoint"].fill_null("no feature"),
        "latent": frame["unit"].cast(pl.String).fill_null(NONE), "rank": figures(frame["rank"]),
        "fires on (tokens)": map(percent, frame["probability"]), "entropy (nats)": figures(frame["entropy"], 3),
        **script_column(inputs, frame),
        "monolinguality": map(significant, frame.get_column("monolinguality", default=[None] * len(frame))),
    }  # fmt: skip
    caption = f"The first {SHOWN_PER_LANGUAGE} features of each language by rank"
    return Table.of(caption, columns, labels=2, folded="the first features of each language")
