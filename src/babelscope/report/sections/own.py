"""Section `own`: what removing a language's features does to it, against what it does to the other languages."""

import altair as alt
import polars as pl

from babelscope.report import charts
from babelscope.report.names import name
from babelscope.report.numbers import significant
from babelscope.report.parts import (
    Picture,
    ReportInputs,
    Section,
    Table,
    bits_per_byte,
    figures,
    how_to_read,
    intervals,
    prose,
)
from babelscope.report.sections import ablation
from babelscope.report.sections.features import features


def section(inputs: ReportInputs) -> Section:
    """Own against others."""
    own, ratio = (inputs.figure("ablate", key) for key in ("own", "ratio"))
    reading = how_to_read(
        """<p>Bar: the ΔNLL of a language when its own features are removed; the thin line is the 95&nbsp;% interval.
Diamond: the mean ΔNLL of the other languages when the same features are removed; the line through it runs from the
smallest to the largest of them (a range, not a confidence interval). A long bar with a diamond near 0 means that the
features affect their own language selectively. Cross, if there is one: the mean ΔNLL of the language when random
latents are removed that fire as often on it, but are specific to no language; its line runs from the smallest to the
largest draw.</p>
<p>Tokens of different languages hold different amounts of text, so nats per token cannot be compared between languages.
Bits per byte can: the same change divided by the bytes of a token, on the right if it is known.</p>
<p>ΔNLL asks how probable the token is that the text has. The divergence in the table (Kullback–Leibler, from the
unchanged model) asks how far the probabilities of all tokens move, in either direction.</p>"""
    )
    caption = prose(
        """<p>On average over the languages, the ΔNLL is {own} nats/token for the language itself. For the other
languages it is {size} in absolute size ({signed} with its sign). The perplexity of the language itself is multiplied by
{ratio} relative to that of the others. Languages with few features tend to have short bars, even if the model
knows them well.</p>""",
        own=significant(own, sign=True),
        size=significant(inputs.figure("ablate", "others_abs"), digits=2),
        signed=significant(inputs.figure("ablate", "others"), sign=True, digits=2),
        ratio=significant(ratio),
    )
    texts = [caption, reading]
    if (moved := inputs.figure("ablate", "kl_own")) is not None:
        divergence = prose(
            """<p>On a sample of the tokens, the distribution of the next token diverges by {own} nats/token for the
language itself and by {others} for the others.</p>""",
            own=significant(moved),
            others=significant(inputs.figure("ablate", "kl_others"), digits=2),
        )
        texts.insert(1, divergence)
    label = "ΔNLL of each language itself and of the other languages"
    picture = Picture("own", label, chart(own_and_others(inputs)), texts)
    return Section("own", "Own and others", finding(inputs), [picture, table(inputs)])


def finding(inputs: ReportInputs) -> str:
    """The mean effects, and which language loses most."""
    own, others = (inputs.figure("ablate", key) for key in ("own", "others_abs"))
    most = own_and_others(inputs).drop_nulls("own").sort("own", descending=True).head(1)
    if own is None or others is None or most.is_empty():
        return "Effect on the language itself and on the others"
    return (
        f"A language loses {significant(own)} nats/token without its features, the others change by "
        f"{significant(others, digits=2)}; {name(most['language'].item())} loses most"
    )


def own_and_others(inputs: ReportInputs) -> pl.DataFrame:
    """The dNLL of each language without its own features, of the other languages, and of it without random features.

    One row per language, in nats/token, null without a run: `language`, `own`, `low`, `high` (its diagonal cell with
    its 95 % interval), `others`, `others_low`, `others_high` (mean and range of the others), `random`, `random_low`,
    `random_high` (mean and range of the draws), `bits` (`own` in bits/byte).
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
        random.agg(random=pl.col("delta").mean(), random_low=pl.col("delta").min(), random_high=pl.col("delta").max()),
    ):
        result = result.join(part, on="language", how="left", maintain_order="left")
    bits = [bits_per_byte(inputs, *row) for row in result.select("language", "own").rows()]
    return result.with_columns(bits=pl.Series(bits, dtype=pl.Float64))


def chart(frame: pl.DataFrame) -> alt.VConcatChart:
    """Bars: each language's own dNLL with its 95 % interval; diamonds and lines: the others' mean and range.

    Beside it, if known, bars of the own dNLL in bits/byte; below it, what the marks mean.
    """
    titles = {
        "own": "itself", "low": "95 % from", "high": "95 % to", "others": "others, mean",
        "others_low": "others, smallest", "others_high": "others, largest", "random": "random latents",
        "bits": "itself, bits/byte",
    }  # fmt: skip
    base = charts.by_language(frame, *((f"{key}:Q", title, charts.SIGNED) for key, title in titles.items()))
    axis = alt.Axis(title="ΔNLL, nats/token", grid=True, tickCount=5)
    above, below = {"yOffset": -5}, {"yOffset": 6}
    # A layer without data would leave the axis without an extent.
    random = [
        base.mark_rule(style="random", strokeWidth=1, **below).encode(x="random_low:Q", x2="random_high:Q"),
        base.mark_point(style="random", shape="cross", filled=True, size=36, **below).encode(x="random:Q"),
    ]
    has_random, has_bits = bool(frame["random"].count()), bool(frame["bits"].count())
    marks = [("own", "square", "itself, with 95 % interval"), ("others", "diamond", "others, mean and range")]
    marks += [("random", "cross", "itself, random latents removed")] if has_random else []
    nats = alt.layer(
        base.mark_bar(style="own", height=9, **above).encode(x=alt.X("own:Q", axis=axis)),
        base.mark_rule(strokeWidth=1.5, **above).encode(x="low:Q", x2="high:Q"),
        base.mark_rule(style="others", strokeWidth=1.5, **below).encode(x="others_low:Q", x2="others_high:Q"),
        base.mark_point(style="others", shape="diamond", filled=True, size=44, **below).encode(x="others:Q"),
        *(random if has_random else []),
    ).properties(width=380 if has_bits else 480, height=alt.Step(32))
    bits = base.mark_bar(style="own", height=9).encode(
        x=alt.X("bits:Q", axis=alt.Axis(title="the same in bits/byte", grid=True, tickCount=4)),
        y=alt.Y("language:N", sort=frame["language"].to_list(), title=None, axis=alt.Axis(labels=False)),
    )
    panels = charts.beside(nats, bits.properties(width=150, height=alt.Step(32))) if has_bits else nats
    text = "Own and others' change of NLL per language; the table below holds the same figures."
    return charts.below(panels, charts.legend(*marks), description=text)


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
        "NLL in bits/byte": figures((bits_per_byte(inputs, *row) for row in frame.select("language", "nll").rows()), 3),
        "ΔNLL of itself": figures(frame["own"], 4, sign=True), "95 %": intervals(frame["low"], frame["high"]),
        "ΔNLL in bits/byte": figures(frame["bits"], 4, sign=True),
        "ΔNLL of others, mean": figures(frame["others"], 5, sign=True),
        "others, smallest to largest": intervals(frame["others_low"], frame["others_high"]),
        "ΔNLL with random latents": figures(frame["random"], 4, sign=True),
    }  # fmt: skip
    if inputs.figure("ablate", "kl_own") is not None:
        for title, key in (("divergence of itself", "kl_own"), ("divergence of others", "kl_others")):
            columns[title] = figures(inputs.each("ablate", key), 5)
    return Table.of("ΔNLL of the language itself and of the others, nats/token", columns, folded="itself and others")
