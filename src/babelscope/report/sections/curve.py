"""Section `curve`: how few features carry a language, the features of the largest effect first."""

import altair as alt
import polars as pl

from babelscope.report import charts
from babelscope.report.parts import Picture, ReportInputs, Section, Table, figures, prose
from babelscope.report.sections.ablation import of_languages

ALL = "all"


def section(inputs: ReportInputs) -> Section | None:
    """The effect over the number of features; None if features were not ranked by it."""
    frame = means(inputs)
    if frame.is_empty():
        return None
    result = prose(
        """<p>Five features or fewer reach half of the effect of all in {five} languages, ten or fewer in {ten}.</p>""",
        five=of_languages(inputs, "languages_half_by/5"),
        ten=of_languages(inputs, "languages_half_by/10"),
    )
    caption = prose(
        """<p>The features of each language are ranked by their own effect: how much more the language loses than the
others if the feature alone is removed, estimated on texts from which the features were selected. Here the first few of
them are removed together from held-out texts. Line: the mean ΔNLL of the languages themselves, with its 95&nbsp;%
interval; diamonds: that of other languages; crosses: the languages themselves without random latents that fire at least
as often as these few features. All numbers of features are compared on the same texts, a part of those of the matrix,
so “all” may differ from the figures above.</p>"""
    )
    picture = Picture("curve", "ΔNLL over the number of features removed", chart(frame), [result, caption])
    title = f"Five features or fewer have half of the effect in {of_languages(inputs, 'languages_half_by/5')} languages"
    return Section("curve", "How few", title, [picture, table(inputs)])


def rows(inputs: ReportInputs) -> pl.DataFrame:
    """The curve of every language of the report; `top` is text."""
    if inputs.curve is None:
        return pl.DataFrame()
    known = inputs.curve.filter(pl.col("language").is_in(inputs.languages))
    top = pl.col("top").cast(pl.String).fill_null(ALL)
    return known.with_columns(pl.col("own", "others", "control").fill_nan(None), top=top)


def means(inputs: ReportInputs) -> pl.DataFrame:
    """Means over the languages: `top`, `own` with `low` and `high` (95 %), `others`, `control`, in nats/token."""
    found = rows(inputs)
    if found.is_empty():
        return found
    mean = found.group_by("top", maintain_order=True).agg(pl.col("own", "others", "control").mean())
    ends = {end: inputs.each("ablate", f"curve_own_{end}", mean["top"]) for end in ("low", "high")}
    return mean.with_columns(pl.Series(end, values, pl.Float64) for end, values in ends.items())


def chart(frame: pl.DataFrame) -> alt.VConcatChart:
    """`means` over the number of features."""
    titles = {"own": "itself", "low": "95 % from", "high": "95 % to", "others": "others", "control": "random latents"}
    base = alt.Chart(charts.data(frame)).encode(
        x=charts.bands("top", frame["top"], title="features removed, those of the largest effect first"),
        tooltip=charts.tips(
            ("top:N", "features"), *((f"{key}:Q", name, charts.SIGNED) for key, name in titles.items())
        ),
    )
    axis = alt.Axis(title="ΔNLL, nats/token", grid=True, tickCount=5)
    # A layer without data would leave the axis without an extent.
    random = [base.mark_point(style="random", shape="cross", filled=True, size=44).encode(y="control:Q")]
    has_random = frame["control"].count() > 0
    plot = alt.layer(
        base.mark_area(style="area").encode(y=alt.Y("low:Q", axis=axis), y2="high:Q"),
        base.mark_line(style="own", point=True).encode(y="own:Q"),
        *(random if has_random else []),
        base.mark_point(style="others", shape="diamond", filled=True, size=44).encode(y="others:Q"),
    ).properties(width=480, height=260)
    entries = [("own", "circle", "itself"), ("others", "diamond", "others"), ("random", "cross", "random latents")]
    text = "Change of NLL over the number of features removed; the table below holds the figures."
    return charts.below(plot, charts.legend(*entries[: 2 + has_random]), description=text)


def table(inputs: ReportInputs) -> Table:
    """Every language: the ΔNLL by the number of features, and how many features reach half of the effect of all."""
    found, names = rows(inputs), inputs.languages
    value = {(language, top): own for language, top, own in found.select("language", "top", "own").iter_rows()}
    size = dict(found.filter(top=ALL).select("language", "features").iter_rows())
    columns = {
        "language": names, "features": figures(size.get(name) for name in names),
        **{f"first {top}" if top != ALL else ALL: figures((value.get((name, top)) for name in names), 4, sign=True)
           for top in found["top"].unique(maintain_order=True)},
        "for half of it": figures(inputs.each("ablate", "features_for_half")),
    }  # fmt: skip
    return Table.of("ΔNLL of the language itself, nats/token", columns, folded="the effect per language")
