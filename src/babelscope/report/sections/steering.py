"""Section `steering`: which vectors make the model answer in another language than the prompt's."""

import altair as alt
import polars as pl

from babelscope.report import charts
from babelscope.report.numbers import plain
from babelscope.report.parts import Picture, ReportInputs, Section, Table, figures, prose

# Answers shown per language and method.
_SAMPLES = 3
_LABELS = {
    "diffmean": "difference of means", "pca": "first principal component", "probe": "linear discriminant",
    "features": "all features", "features-1": "first feature", "features-2": "first 2 features",
    "features-5": "first 5 features", "sae-diffmean": "difference of means of latents", "neurons": "neurons (LAPE)",
    "prompt": "an example in the prompt", "nothing": "unsteered",
}  # fmt: skip
_VERDICTS = {
    "better": "steer better than the difference of means", "worse": "steer worse than the difference of means",
    "undecided": "cannot be told from the difference of means",
}  # fmt: skip

_RELEVANT = {
    "encoder": "whose own prompt is the most similar of eight, so an answer about nothing has 1 in 8",
    "endpoint": "that a language model behind an endpoint finds to be about their prompt",
}


def section(inputs: ReportInputs) -> Section | None:
    """The methods' scores and some answers; None if no text was generated."""
    table = methods(inputs)
    if table.is_empty():
        return None
    steer = inputs.params.get("steer", {})
    caption = prose(
        """<p>Each method adds a language’s vector, less that of the prompt’s language, to the model’s states at every
token of a prompt and of the answer, so that the model answers in another language. <em>Forcing</em> is the share of
answers that fastText identifies as the language. <em>Relevance</em> is the share of answers {relevant}. The score is
their harmonic mean, averaged over the languages that no prompt is in (prompts: {prompts}). Place and strength were
chosen on other prompts. Bars are 95&nbsp;% intervals over the prompts; small dots are languages.</p>
<p>{verdict}</p>""",
        prompts=", ".join(steer.get("prompt_languages", [])),
        relevant=_RELEVANT[steer.get("relevance", "encoder")],
        verdict=verdict(inputs),
    )
    picture = Picture("steering", "Score by method", chart(table, by_language(inputs)), [caption])
    best, found = inputs.figure("steer", "best"), inputs.figure("steer", "verdict")
    heading = "Making the model answer in a language"
    if best is not None:
        score = plain(inputs.figure("steer", "best_harmonic"), 2)
        heading = f"The best vector to steer with, {_LABELS.get(str(best), str(best))}, scores {score} of 1"
        heading += "" if found is None else f"; features {_VERDICTS[found]}"
    return Section("steering", "Steering", heading, [picture, scores(table), samples(inputs)])


def verdict(inputs: ReportInputs) -> str:
    """Whether features steer better than one difference of means, in a sentence."""
    found = inputs.figure("steer", "verdict")
    if found is None:
        return "Features and the difference of means were not both tried, so they are not compared."
    keys = ("features_minus_diffmean", "features_minus_diffmean_low", "features_minus_diffmean_high")
    value, low, high = (plain(inputs.figure("steer", key), 2, sign=True) for key in keys)
    name = _LABELS.get(str(inputs.figure("steer", "features_method")), "features")
    return (
        f"Features ({name}: the best of the feature methods on the development prompts) {_VERDICTS[found]}: "
        f"{value} (95 % from {low} to {high})."
    )


def methods(inputs: ReportInputs) -> pl.DataFrame:
    """`method`, `label`, `value` (mean harmonic mean), `low`, `high`, `forcing`, `relevance`, `nll`, `distinct_2`,
    `sampled`; the best method first. Empty without generated text.
    """  # fmt: skip
    rows = []
    for key, value in inputs.metrics.get("steer", {}).items():
        head, _, method = key.partition("/")
        if head != "harmonic":
            continue
        names = ("harmonic_low", "harmonic_high", "forcing", "relevance", "nll", "distinct_2", "harmonic_sampled")
        rest = [inputs.figure("steer", f"{name}/{method}") for name in names]
        rows.append((method, _LABELS.get(method, method), value, *rest))
    columns = ["method", "label", "value", "low", "high", "forcing", "relevance", "nll", "distinct_2", "sampled"]
    schema = {name: pl.String if name in ("method", "label") else pl.Float64 for name in columns}
    return pl.DataFrame(rows, schema=schema, orient="row").sort("value", descending=True, maintain_order=True)


def by_language(inputs: ReportInputs) -> pl.DataFrame:
    """`label`, `language`, `value` (harmonic mean), `forcing`, `relevance`, for every method and language."""
    rows = [
        (_LABELS.get(method, method), language, *values)
        for method in methods(inputs)["method"]
        for language in inputs.languages
        if (values := [inputs.figure("steer", f"{method}/{name}/{language}")
                       for name in ("harmonic", "forcing", "relevance")])[0] is not None
    ]  # fmt: skip
    names = ["label", "language", "value", "forcing", "relevance"]
    schema = {name: pl.String if name in ("label", "language") else pl.Float64 for name in names}
    return pl.DataFrame(rows, schema=schema, orient="row")


def chart(table: pl.DataFrame, languages: pl.DataFrame) -> alt.LayerChart:
    """A row per method: its score with the interval, and a dot per language that says which on hover."""
    y = alt.Y("label:N", sort=table["label"].to_list(), title=None, axis=alt.Axis(labelLimit=220))
    x = alt.X("value:Q", title="harmonic mean of forcing and relevance", scale=alt.Scale(domain=[0, 1]))
    shares = (("forcing:Q", "forcing", ".2f"), ("relevance:Q", "relevance", ".2f"))
    dots = alt.Chart(charts.data(languages)).mark_point(style="others", filled=True, size=18, opacity=0.55)
    base = alt.Chart(charts.data(table)).encode(
        y=y, tooltip=charts.tips(("label:N", "method"), ("value:Q", "mean", ".3f"), *charts.ends(".3f"), *shares)
    )
    return alt.layer(
        dots.encode(x=x, y=y, tooltip=charts.tips("language:N", ("value:Q", "harmonic mean", ".2f"), *shares)),
        base.mark_rule(style="own", strokeWidth=2).encode(x=alt.X("low:Q"), x2="high:Q"),
        base.mark_point(style="own", filled=True, size=60, opacity=1).encode(x=x),
        description="Harmonic mean of forcing and relevance by method of steering; the table holds the same figures.",
    ).properties(width=430, height=alt.Step(26))


def scores(table: pl.DataFrame) -> Table:
    """`methods` as text."""
    columns = {
        "method": table["label"], "harmonic mean": figures(table["value"], 2),
        "95 %": [f"{plain(a, 2)} to {plain(b, 2)}" for a, b in table.select("low", "high").iter_rows()],
        "forcing": figures(table["forcing"], 2), "relevance": figures(table["relevance"], 2),
        "sampled": figures(table["sampled"], 2), "NLL (nats/token)": figures(table["nll"], 2),
        "distinct bigrams": figures(table["distinct_2"], 2),
    }  # fmt: skip
    return Table.of("Steering by method: greedy answers, and the harmonic mean of sampled ones", columns)


def samples(inputs: ReportInputs) -> Table:
    """The answers to the first prompts, for every language and method at its chosen place and strength."""
    texts = pl.DataFrame() if inputs.generations is None else inputs.generations
    head = ["language", "method", "prompt", "answer", "fastText"]
    rows: list[list[str]] = []
    if len(texts):
        shown = texts.filter(pl.col("decoding") == "greedy", pl.col("slot") < _SAMPLES)
        shown = shown.filter(pl.col("language").is_in(inputs.languages), pl.col("method").is_in(list(_LABELS)))
        shown = shown.sort(inputs.order("language"), pl.col("method").cast(pl.Enum(list(_LABELS))), "slot")
        for row in shown.select("language", "method", "prompt", "text", "predicted").iter_rows():
            rows.append([row[0], _LABELS[row[1]], *(" ".join(str(cell).split()) for cell in row[2:])])
    return Table("Answers to the same prompts", head, rows or [["–"] * 5], labels=5, folded="some answers")
