"""Section `identification`: which language held-out texts were taken for, by the features and by fastText."""

import altair as alt
import polars as pl

from babelscope.report import charts
from babelscope.report.numbers import NONE, p_value, percent, plain
from babelscope.report.parts import Picture, ReportInputs, Section, Table, prose

# The first of each that there is: the firings, divided by the features owned, of SAE features or else of neurons.
_SHOWN = {"features": [("sae-count", "units"), ("neuron-count", "units")], "fastText": [("fasttext", "none")]}


def section(inputs: ReportInputs) -> Section | None:
    """The confusion matrices; None if there are none."""
    frame = confusion(inputs)
    if frame.is_empty():
        return None
    caption = [
        prose(
            """<p>Each of {texts} held-out texts is taken for the language whose features fire most often on it, divided by how many that
language owns: right for {accuracy}. fastText, restricted to the same languages, is right for {fasttext}.
Rows: the language of the text; figures: texts; off the diagonal are the mistakes.</p>""",
            texts=plain(inputs.figure("identify", "texts")),
            accuracy=accuracy(inputs),
            fasttext=accuracy(inputs, "fasttext/none"),
        )
    ]
    # fastText does not know these, or does not tell them apart.
    names = [name for name in inputs.languages if name not in set(inputs.confusion["language"])]  # type: ignore[index]
    if names:
        caption.append(
            prose(
                """<p>Left out for both: {names}, which fastText does not know or does not tell apart. The table also has what the features
make of all texts, among all languages.</p>""",
                names=", ".join(names),
            )
        )
    test = prose(
        "<p>McNemar’s test against fastText: a small p means that one of the two is right more often than chance explains.</p>"
    )
    label = "Which language held-out texts were taken for"
    picture = Picture("confusion", label, chart(frame), [*caption, methods_table(inputs), test], wide=True)
    return Section("identification", "Identification", "Can the features tell the language?", [picture, table(frame)])


def accuracy(inputs: ReportInputs, method: str = "sae-count/units") -> str:
    """The share of texts whose language is found."""
    return percent(inputs.figure("identify", f"accuracy/{method}"))


def confusion(inputs: ReportInputs) -> pl.DataFrame:
    """Which language held-out texts were taken for, by the features' firings and by fastText.

    Returns
    -------
    `method` ("features" or "fastText"), `language`, `predicted`, `texts`, `value` (share of the language's texts), in
    the order of params.yaml. Empty without a confusion matrix.
    """
    if inputs.confusion is None:
        return pl.DataFrame()
    parts = []
    for label, candidates in _SHOWN.items():
        found = [inputs.confusion.filter(method=method, normalize=normalize) for method, normalize in candidates]
        parts += [rows.with_columns(method=pl.lit(label)) for rows in found if len(rows)][:1]
    if not parts:
        return pl.DataFrame()
    total = pl.col("texts").sum().over("method", "language")
    names = pl.col("language", "predicted")
    return (
        pl.concat(parts)
        .filter(pl.col("language").is_in(inputs.languages), pl.col("predicted").is_in(inputs.languages))
        .with_columns(names.cast(pl.Enum(inputs.languages)), value=pl.when(total > 0).then(pl.col("texts") / total))
        .sort(pl.col("method").cast(pl.Enum(list(_SHOWN))), "language", "predicted")
        .with_columns(names.cast(pl.String))
        .select("method", "language", "predicted", "texts", "value")
    )


def chart(frame: pl.DataFrame) -> alt.HConcatChart:
    """A matrix per method: what share of a language's texts was taken for which language, with the numbers of texts."""
    panels = []
    for number, method in enumerate(frame["method"].unique(maintain_order=True)):
        rows, name = frame.filter(pl.col("method") == method), f"confusion{number}"
        scale = alt.Scale(domain=rows["language"].unique(maintain_order=True).to_list())
        axis = alt.Axis(title=f"taken for, by {method}", orient="top", labelAngle=-90, titleAnchor="start")
        base = alt.Chart(charts.data(rows)).encode(
            x=alt.X("predicted:N", scale=scale, axis=axis),
            y=alt.Y("language:N", scale=scale, title="text in"),
            tooltip=charts.tips(("language:N", "text in"), ("predicted:N", "taken for"), "texts:Q",
                                ("value:Q", "share", ".1%")),
        )  # fmt: skip
        cells, texts = charts.cells(base, name, alt.Scale(range="ramp", domain=[0, 1]), "texts:Q")
        panel = alt.layer(cells, texts.transform_filter("datum.texts > 0"), name=name)
        panels.append(panel.properties(width=alt.Step(24), height=alt.Step(22)))
    text = "Which language held-out texts were taken for; the table below holds the same figures."
    return charts.beside(*panels, description=text)


def methods_table(inputs: ReportInputs) -> Table:
    """Every method of language identification."""
    rows = []
    for prefix, note in (("", ""), ("all_languages/", ", among all languages")):
        texts = plain(inputs.figure("identify", f"{prefix}texts"))
        for key in sorted(inputs.metrics.get("identify", {})):
            if key.startswith(f"{prefix}accuracy/"):
                rest = key.removeprefix(f"{prefix}accuracy/")
                method, _, normalize = rest.partition("/")
                f1, p = (inputs.figure("identify", f"{prefix}{name}/{rest}") for name in ("macro_f1", "mcnemar_p"))
                name = f"{method}, by units owned{note}" if normalize == "units" else f"{method}{note}"
                rows.append([name, texts, percent(inputs.figure("identify", key)), percent(f1), p_value(p)])
    head = ["method", "texts", "accuracy", "macro F1", "McNemar p"]
    return Table("Language identification of held-out texts", head, rows)


def table(frame: pl.DataFrame) -> Table:
    """Texts that were taken for another language."""
    wrong = frame.filter(pl.col("language") != pl.col("predicted"), pl.col("texts") > 0)
    rows = [[*names, plain(texts), percent(share)] for *names, texts, share in wrong.rows()]
    head = ["method", "text in", "taken for", "texts", "of that language's"]
    caption = "Texts that were taken for another language"
    return Table(
        caption, head, rows or [["none", *[NONE] * 4]], labels=3, folded=f"Table: {caption[0].lower()}{caption[1:]}"
    )
