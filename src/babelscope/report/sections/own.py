"""Section `own`: what removing a language's features does to it, against what it does to the other languages."""

import altair as alt
import polars as pl

from babelscope.report import charts
from babelscope.report.numbers import significant
from babelscope.report.parts import Picture, ReportInputs, Section, Table, figures, intervals, prose
from babelscope.report.sections import ablation
from babelscope.report.sections.features import features


def section(inputs: ReportInputs) -> Section:
    """Own against others."""
    own, ratio = (inputs.figure("ablate", key) for key in ("own", "ratio"))
    caption = prose(
        """<p>Bar: the ΔNLL of a language when its own features are removed; the thin line is the 95&nbsp;% interval.
Diamond: the mean ΔNLL of the other languages when the same features are removed; the line through it runs from the
smallest to the largest of them (a range, not a confidence interval). A long bar with a diamond near 0 means that the
features affect their own language selectively. Cross, if there is one: the mean ΔNLL of the language when random
latents are removed that fire at least as often on it, but are specific to no language.</p>
<p>On average over the languages, the ΔNLL is {own} nats/token for the language itself. For the other languages it is
{size} in absolute size ({signed} with its sign). Relative to the others, this multiplies the perplexity of the language
itself by {ratio}. Languages with few features tend to have short bars, even if the model knows them well.</p>""",
        own=significant(own, sign=True),
        size=significant(inputs.figure("ablate", "others_abs"), digits=2),
        signed=significant(inputs.figure("ablate", "others"), sign=True, digits=2),
        ratio=significant(ratio),
    )
    label = "ΔNLL of each language itself and of the other languages"
    picture = Picture("own", label, chart(own_and_others(inputs)), [caption])
    return Section("own", "Own and others", "Effect on the language itself and on the others", [picture, table(inputs)])


def own_and_others(inputs: ReportInputs) -> pl.DataFrame:
    """The dNLL of each language without its own features, of the other languages, and of it without random features.

    One row per language, in nats/token, null without a run: `language`, `own`, `low`, `high` (its diagonal cell with
    its 95 % interval), `others`, `others_low`, `others_high` (mean and range of the others), `random` (mean of draws).
    """
    cells, delta = ablation.matrix(inputs), pl.col("value")
    own = cells.filter("own").select("low", "high", language="ablated", own="value")
    others = cells.filter(~pl.col("own")).group_by(language="ablated", maintain_order=True)
    draws = ablation.of_method(inputs, inputs.nll).filter(pl.col("control").is_not_null())
    random = draws.filter(pl.col("ablated") == pl.col("evaluated")).group_by(language="ablated", maintain_order=True)
    result = pl.DataFrame({"language": inputs.languages})
    for part in (
        own,
        others.agg(others=delta.mean(), others_low=delta.min(), others_high=delta.max()),
        random.agg(random=pl.col("delta").mean()),
    ):
        result = result.join(part, on="language", how="left", maintain_order="left")
    return result


def chart(frame: pl.DataFrame) -> alt.LayerChart:
    """Bars: each language's own dNLL with its 95 % interval; diamonds and lines: the others' mean and range."""
    titles = {
        "own": "itself", "low": "95 % from", "high": "95 % to", "others": "others, mean",
        "others_low": "others, smallest", "others_high": "others, largest", "random": "random latents",
    }  # fmt: skip
    base = alt.Chart(charts.data(frame)).encode(
        y=alt.Y("language:N", sort=frame["language"].to_list(), title=None),
        tooltip=charts.tips("language:N", *((f"{key}:Q", title, charts.SIGNED) for key, title in titles.items())),
    )
    axis = alt.Axis(title="ΔNLL, nats/token", grid=True, tickCount=5)
    above, below = {"yOffset": -5}, {"yOffset": 6}
    # A layer without data would leave the axis without an extent.
    random = [base.mark_point(style="random", shape="cross", filled=True, size=36, **below).encode(x="random:Q")]
    return alt.layer(
        base.mark_bar(style="own", height=9, **above).encode(x=alt.X("own:Q", axis=axis)),
        base.mark_rule(strokeWidth=1.5, **above).encode(x="low:Q", x2="high:Q"),
        base.mark_rule(style="others", strokeWidth=1.5, **below).encode(x="others_low:Q", x2="others_high:Q"),
        base.mark_point(style="others", shape="diamond", filled=True, size=44, **below).encode(x="others:Q"),
        *(random if frame["random"].count() else []),
        description="Own and others' change of NLL per language; the table below holds the same figures.",
    ).properties(width=280, height=alt.Step(30))


def table(inputs: ReportInputs) -> Table:
    """`own_and_others`, and the NLL of the run in which nothing is ablated."""
    # That run may carry a method of its own, so the method is not asked for.
    clean = inputs.nll.filter(pl.col("ablated").is_null()).unique("evaluated", keep="first", maintain_order=True)
    clean = clean.select("tokens", "nll", language="evaluated")
    frame = own_and_others(inputs)
    for part in (clean, features(inputs).group_by("language").len("features")):
        frame = frame.join(part, on="language", how="left", maintain_order="left")
    columns = {
        "language": frame["language"], "features": figures(frame["features"].fill_null(0)),
        "evaluated tokens": figures(frame["tokens"]), "NLL, nothing removed": figures(frame["nll"], 3),
        "ΔNLL of itself": figures(frame["own"], 4, sign=True), "95 %": intervals(frame["low"], frame["high"]),
        "ΔNLL of others, mean": figures(frame["others"], 5, sign=True),
        "others, smallest to largest": intervals(frame["others_low"], frame["others_high"]),
        "ΔNLL with random latents": figures(frame["random"], 4, sign=True),
    }  # fmt: skip
    return Table.of("ΔNLL of the language itself and of the others, nats/token", columns, folded="itself and others")
