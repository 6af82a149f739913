"""Section `own`: what removing a language's features does to it, against what it does to the other languages."""

import altair as alt
import polars as pl

from babelscope.report import charts
from babelscope.report.numbers import significant
from babelscope.report.parts import Picture, ReportInputs, Section, Table, figures, intervals, prose
from babelscope.report.sections import ablation, control
from babelscope.report.sections.features import features


def section(inputs: ReportInputs) -> Section:
    """Own against others, and against random features."""
    caption = prose(
        """<p>Bar: what removing a language’s features does to that language; the thin line is the 95&nbsp;% interval. Diamond
below it: the mean over all other languages, its line from the least to the largest of them (a range, not an interval). A long
bar above a diamond at 0 is a selective set. A cross, where one is drawn, is what random latents do to the language itself
that are specific to no language, nor would be to this one at lower thresholds, and fire at least as often on it.</p>"""
    )
    above = inputs.figure("ablate", "languages_above_control")
    against = prose(
        """<p><strong>Against such random latents</strong>, a language’s own cost it more in {above} languages; the difference between it
and the others is larger than theirs in {selective} (95&nbsp;% intervals over texts and draws; <code>data/ablation/control.parquet</code>).
For the rest, a long bar says no more than that latents which fire often were removed.</p>""",
        above=ablation.of_languages(inputs, "languages_above_control"),
        selective=ablation.of_languages(inputs, "languages_selective"),
    )
    overall = prose(
        """<p>Over all languages: own {own}, others {others_abs} nats/token in mean size ({others} in mean); the perplexities change in the ratio
{ratio}. Languages with few features tend to have short bars, whatever the model knows of them.</p>""",
        own=significant(inputs.figure("ablate", "own"), sign=True),
        others_abs=significant(inputs.figure("ablate", "others_abs"), digits=2),
        others=significant(inputs.figure("ablate", "others"), sign=True, digits=2),
        ratio=significant(inputs.figure("ablate", "ratio")),
    )
    text = [caption, overall] if above is None else [caption, against, overall]
    picture = Picture("own", "Own and others’ change of NLL per language", chart(own_and_others(inputs)), text)
    title = "Own against others, language by language"
    return Section("own", "Own against others", title, [picture, table(inputs), *control.blocks(inputs)])


def own_and_others(inputs: ReportInputs) -> pl.DataFrame:
    """What ablating each language's features does to it, to the others, and what as many random features do to it.

    Returns
    -------
    One row per language in the order of params.yaml: `language`, `own`, `low`, `high` (its diagonal cell and 95 %
    interval), `others` (mean over the other languages), `others_low`, `others_high` (the least and the largest of
    them), `random` (mean over the control draws); nats/token, null if there is no such run.
    """
    cells = ablation.matrix(inputs)
    own = cells.filter("own").select("low", "high", language="ablated", own="value")
    others = (
        cells.filter(~pl.col("own"))
        .group_by(language="ablated", maintain_order=True)
        .agg(others=pl.col("value").mean(), others_low=pl.col("value").min(), others_high=pl.col("value").max())
    )
    random = (
        ablation.of_method(inputs, inputs.nll)
        .filter(pl.col("control").is_not_null(), pl.col("ablated") == pl.col("evaluated"))
        .group_by(language="ablated", maintain_order=True)
        .agg(random=pl.col("delta").mean())
    )
    result = pl.DataFrame({"language": inputs.languages})
    for part in (own, others, random):
        result = result.join(part, on="language", how="left", maintain_order="left")
    return result


def chart(frame: pl.DataFrame) -> alt.LayerChart:
    """Bars: each language's own dNLL with its 95 % interval; ticks and lines: the other languages' mean and range."""
    titles = {"own": "own ΔNLL", "low": "95 % from", "high": "95 % to", "others": "others, mean",
              "others_low": "others, least", "others_high": "others, largest", "random": "random features"}  # fmt: skip
    base = alt.Chart(charts.data(frame)).encode(
        y=alt.Y("language:N", sort=frame["language"].to_list(), title=None),
        tooltip=charts.tips("language:N", *((f"{key}:Q", title, charts.SIGNED) for key, title in titles.items())),
    )
    axis = alt.Axis(title="ΔNLL, nats/token", grid=True, tickCount=5)
    own, below = {"yOffset": -5}, {"yOffset": 6}
    # A layer without data would leave the axis without an extent.
    random = [base.mark_point(style="random", shape="cross", filled=True, size=36, **below).encode(x="random:Q")]
    return alt.layer(
        base.mark_bar(style="own", height=9, **own).encode(x=alt.X("own:Q", axis=axis)),
        base.mark_rule(strokeWidth=1.5, **own).encode(x="low:Q", x2="high:Q"),
        base.mark_rule(style="others", strokeWidth=1.5, **below).encode(x="others_low:Q", x2="others_high:Q"),
        base.mark_point(style="others", shape="diamond", filled=True, size=44, **below).encode(x="others:Q"),
        *(random if frame["random"].count() else []),
        description="Own and others' change of NLL per language; the table below holds the same figures.",
    ).properties(width=280, height=alt.Step(30))


def table(inputs: ReportInputs) -> Table:
    """Per language: the NLL of the clean run, what its own ablation does to it and to the others."""
    frame = own_and_others(inputs)
    # The clean run may carry a method of its own, so the method is not asked for.
    clean = inputs.nll.filter(pl.col("ablated").is_null()).unique("evaluated", keep="first", maintain_order=True)
    units = features(inputs).group_by(language="language").len("features")
    frame = frame.join(units, on="language", how="left", maintain_order="left")
    frame = frame.join(clean, left_on="language", right_on="evaluated", how="left", maintain_order="left", suffix="_")
    columns = {
        "language": frame["language"],
        "features": figures(frame["features"].fill_null(0)),
        "eval tokens": figures(frame["tokens"]),
        "NLL untouched": figures(frame["nll"], 3),
        "own ΔNLL": figures(frame["own"], 4, sign=True),
        "95 %": intervals(frame["low"], frame["high"]),
        "others, mean": figures(frame["others"], 5, sign=True),
        "others, least to largest": intervals(frame["others_low"], frame["others_high"]),
        "random features": figures(frame["random"], 4, sign=True),
    }
    return Table.of("Own against others, nats/token", columns, folded="Table: own and others")
