"""Section `identification`: as which language held-out texts are identified, by the features and by fastText."""

import altair as alt
import polars as pl

from babelscope.report import charts
from babelscope.report.numbers import NONE, p_value, percent, plain
from babelscope.report.parts import Block, Picture, ReportInputs, Section, Table, figures, how_to_read, prose

# The first of each that there is: the firings, divided by the features owned, of SAE features or else of neurons.
_SHOWN = {"features": [("sae-count", "units"), ("neuron-count", "units")], "fastText": [("fasttext", "none")]}


def section(inputs: ReportInputs) -> Section | None:
    """The confusion matrices; None if there are none."""
    frame = confusion(inputs)
    if inputs.confusion is None or frame.is_empty():
        return None
    caption = how_to_read(
        """<p>Each of {texts} held-out texts is identified as the language whose features fire most often on it,
relative to how many features that language has. This is right for {accuracy} of the texts; fastText, which chooses
among the same languages, is right for {fasttext}. A row is the language of the texts, a column is the language as which
they were identified, and the number in a cell counts texts: those off the diagonal are errors.</p>""",
        texts=plain(inputs.figure("identify", "texts")),
        accuracy=accuracy(inputs),
        fasttext=accuracy(inputs, "fasttext/none"),
    )
    known = set(inputs.confusion["language"])
    names = [name for name in inputs.languages if name not in known]
    missing = prose(
        """<p>Both leave out texts in {names}: fastText does not know these languages, or does not tell them apart. The
table also shows how the features do on all texts, among all languages.</p>""",
        names=", ".join(names),
    )
    test = prose(
        """<p>The methods sae-count and neuron-count add up how often features or neurons fire; sae-min-max adds up the
activations, scaled to between 0 and 1. The p is that of McNemar’s test against fastText: if it is small, chance does
not explain that one of the two is right more often.</p>"""
    )
    text: list[Block] = [methods_table(inputs), *([missing] if names else []), caption, test]
    label = "Language of held-out texts, and language as identified"
    picture = Picture("confusion", label, chart(frame), text, wide=True)
    return Section("identification", "Identification", finding(inputs), [picture, table(frame)])


def finding(inputs: ReportInputs) -> str:
    """How many texts the features identify, and how many fastText does."""
    if inputs.figure("identify", "accuracy/sae-count/units") is None:
        return "Identifying the language of a text"
    return (
        f"The features tell the language of {accuracy(inputs)} of held-out texts, fastText of "
        f"{accuracy(inputs, 'fasttext/none')}"
    )


def accuracy(inputs: ReportInputs, method: str = "sae-count/units") -> str:
    """The share of texts whose language is found."""
    return percent(inputs.figure("identify", f"accuracy/{method}"))


def confusion(inputs: ReportInputs) -> pl.DataFrame:
    """As which language held-out texts were identified; empty without a confusion matrix.

    The columns are `method` ("features" or "fastText"), `language`, `predicted`, `texts` and `value` (share of the
    language's texts).
    """
    parts: list[pl.DataFrame] = []
    texts = pl.DataFrame() if inputs.confusion is None else inputs.confusion
    for label, candidates in _SHOWN.items() if len(texts) else ():
        found = [texts.filter(method=method, normalize=normalize) for method, normalize in candidates]
        parts += [rows.with_columns(method=pl.lit(label)) for rows in found if len(rows)][:1]
    if not parts:
        return pl.DataFrame()
    total = pl.col("texts").sum().over("method", "language")
    return (
        pl.concat(parts)
        .filter(pl.col("language").is_in(inputs.languages), pl.col("predicted").is_in(inputs.languages))
        .with_columns(value=pl.when(total > 0).then(pl.col("texts") / total))
        .sort(pl.col("method").cast(pl.Enum(list(_SHOWN))), inputs.order("language"), inputs.order("predicted"))
        .select("method", "language", "predicted", "texts", "value")
    )


def chart(frame: pl.DataFrame) -> alt.HConcatChart:
    """A matrix per method: the share of a language's texts that was identified as each, with the numbers of texts."""
    panels: list[alt.LayerChart] = []
    for number, method in enumerate(frame["method"].unique(maintain_order=True)):
        rows, name = frame.filter(pl.col("method") == method), f"confusion{number}"
        languages, title = rows["language"].unique(maintain_order=True).to_list(), "language of the text"
        scale, first = alt.Scale(domain=languages), charts.languages_axis(languages, title=title)
        axis = alt.Axis(title=f"identified as, by {method}", orient="top", labelAngle=-90, titleAnchor="start")
        base = alt.Chart(charts.data(rows)).encode(
            x=alt.X("predicted:N", scale=scale, axis=axis),
            y=alt.Y("language:N", scale=scale, axis=alt.Axis(title=None) if panels else first),
            tooltip=charts.tips(("language:N", "language of the text"), ("predicted:N", "identified as"), "texts:Q",
                                ("value:Q", "share", ".1%")),
        )  # fmt: skip
        cells, texts = charts.cells(base, name, alt.Scale(range="ramp", domain=[0, 1]), "texts:Q")
        panel = alt.layer(cells, texts.transform_filter("datum.texts > 0"), name=name)
        panels.append(panel.properties(width=alt.Step(28), height=alt.Step(24)))
    text = "As which language held-out texts were identified; the tables hold the errors."
    return charts.beside(*panels, description=text)


def methods_table(inputs: ReportInputs) -> Table:
    """Every method of language identification."""
    rows, numbers = [], inputs.metrics.get("identify", {})
    sources = sorted(
        {key.removeprefix("source/").rpartition("/accuracy/")[0] for key in numbers if key.startswith("source/")} - {""}
    )
    parts = [("", ""), ("all_languages/", ", among all languages")]
    for prefix, note in [*parts, *((f"source/{name}/", f", texts of {name} alone") for name in sources)]:
        texts = plain(inputs.figure("identify", f"{prefix}texts"))
        for key in sorted(numbers):
            if key.startswith(f"{prefix}accuracy/"):
                rest = key.removeprefix(f"{prefix}accuracy/")
                names = ("accuracy", "macro_f1", "mcnemar_p")
                share, f1, p = (inputs.figure("identify", f"{prefix}{name}/{rest}") for name in names)
                name = rest.replace("/units", ", relative to the number of features").replace("/none", "")
                rows.append([f"{name}{note}", texts, percent(share), percent(f1), p_value(p)])
    head = ["method", "texts", "accuracy", "macro F1", "McNemar p"]
    return Table("Identifying the language of held-out texts", head, rows)


def table(frame: pl.DataFrame) -> Table:
    """Texts that were identified as another language."""
    wrong = frame.filter(pl.col("language") != pl.col("predicted"), pl.col("texts") > 0)
    columns = {
        "method": wrong["method"], "language of the text": wrong["language"], "identified as": wrong["predicted"],
        "texts": figures(wrong["texts"]), "share of the language’s texts": map(percent, wrong["value"]),
    }  # fmt: skip
    table = Table.of("Texts identified as another language", columns, labels=3, folded="the errors")
    return table if table.rows else Table(table.caption, table.head, [["none", *[NONE] * 4]], 3, table.folded)
