"""The tables behind the pictures: headings and cells as text."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import polars as pl

from babelscope.report import data
from babelscope.report.data import ReportInputs
from babelscope.report.numbers import NONE, p_value, percent, plain, significant

SHOWN_PER_LANGUAGE = 10


@dataclass(frozen=True)
class Table:
    """A table as the page shows it; the first `labels` columns are text, the others figures."""

    caption: str
    head: list[str]
    rows: list[list[str]]
    labels: int = 1


def _wide(frame: pl.DataFrame, decimals: int) -> list[list[str]]:
    """A (language, hookpoint, value) grid as rows per language."""
    rows: dict[str, list[str]] = {}
    for language, value in frame.select("language", "value").rows():
        rows.setdefault(language, [language]).append(plain(value, decimals))
    return list(rows.values())


def counts(inputs: ReportInputs) -> Table:
    """Features per language and hookpoint, with sums, and the languages that they fire in (effective number)."""
    frame = data.counts(inputs)
    sums = {key: frame.filter(pl.col("language") == key)["value"].sum() for key in inputs.languages}

    def effective(end: str) -> str:
        return plain(inputs.figure("score", f"effective_languages{end}"), 2)

    rows = [[*row, plain(sums[row[0]]), effective(f"/{row[0]}")] for row in _wide(frame, 0)]
    totals = [frame.filter(pl.col("hookpoint") == key)["value"].sum() for key in inputs.hookpoints]
    rows.append(["all", *(plain(total) for total in totals), plain(data.found(inputs)), effective("")])
    head = ["language", *inputs.hookpoints, "all", "effective languages"]
    return Table("Features per language and hookpoint", head, rows)


def top_features(inputs: ReportInputs) -> Table:
    """The first features of every language, in rank order."""
    frame = data.features(inputs).group_by("language", maintain_order=True).head(SHOWN_PER_LANGUAGE)
    by_language: dict[str, list[list[str]]] = {language: [] for language in inputs.languages}
    for row in frame.rows(named=True):
        by_language[row["language"]].append(
            [row["language"], row["hookpoint"], str(row["unit"]), plain(row["rank"]), percent(row["probability"]),
             plain(row["entropy"], 3), significant(row.get("monolinguality"))]
        )  # fmt: skip
    empty = {language: [[language, "no feature", *[NONE] * 5]] for language in inputs.languages}
    return Table(
        f"The first {SHOWN_PER_LANGUAGE} features of each language by rank",
        ["language", "hookpoint", "unit", "rank", "fires on (tokens)", "entropy (nats)", "monolinguality"],
        [row for language in inputs.languages for row in by_language[language] or empty[language]],
        labels=2,
    )


def _interval(low: Any, high: Any) -> str:
    return NONE if low is None or high is None else f"{plain(low, 4, sign=True)} to {plain(high, 4, sign=True)}"


def ablation_rows(inputs: ReportInputs) -> Table:
    """Per language: the clean NLL, what its own ablation does to it and to the others."""
    clean = {row[0]: row[1:] for row in data.clean(inputs).rows()}
    units = dict(data.features(inputs).group_by("language", maintain_order=True).len().rows())
    rows = []
    for row in data.own_and_others(inputs).rows(named=True):
        nll, tokens = clean.get(row["language"], (None, None))
        rows.append(
            [row["language"], plain(units.get(row["language"], 0)), plain(tokens), plain(nll, 3),
             plain(row["own"], 4, sign=True), _interval(row["low"], row["high"]), plain(row["others"], 5, sign=True),
             _interval(row["others_low"], row["others_high"]), plain(row["random"], 4, sign=True)]
        )  # fmt: skip
    head = ["language", "features", "eval tokens", "NLL untouched", "own ΔNLL", "95 %", "others, mean",
            "others, least to largest", "random features"]  # fmt: skip
    return Table("Own against others, nats/token", head, rows)


def ablation_cells(inputs: ReportInputs) -> Table:
    """The matrix with four decimals; an asterisk marks the largest of a row."""
    cells = {
        (a, e): (v, big)
        for a, e, v, big in data.matrix(inputs).select("ablated", "evaluated", "value", "largest").rows()
    }
    rows = []
    for ablated in inputs.languages:
        row = [cells.get((ablated, evaluated), (None, False)) for evaluated in inputs.languages]
        rows.append([ablated, *(plain(value, 4) + ("*" if largest else "") for value, largest in row)])
    caption = "ΔNLL in nats/token: row = features removed, column = evaluated on, * = largest of its row"
    return Table(caption, ["removed", *inputs.languages], rows)


def own_by_layer(inputs: ReportInputs) -> Table:
    """Own dNLL per hookpoint alone."""
    rows = _wide(data.own_by_layer(inputs), 4)
    return Table("Own ΔNLL with one hookpoint ablated alone, nats/token", ["language", *inputs.hookpoints], rows)


def by_hookpoint(inputs: ReportInputs) -> Table:
    """Own against others per hookpoint alone, over all languages."""
    frame = data.own_by_layer(inputs)
    features = dict(data.counts(inputs).group_by("hookpoint").agg(pl.col("value").sum()).iter_rows())
    rows = [
        [name, plain(features[name]), plain(own, 4, sign=True), plain(others, 5, sign=True),
         NONE if ahead is None else f"{ahead} of {len(inputs.languages)}"]
        for name, _, own, others, ahead in data.by_hookpoint(frame).rows()
    ]  # fmt: skip
    head = ["hookpoint", "features", "own ΔNLL", "others’ ΔNLL", "diagonal largest"]
    return Table("One hookpoint ablated alone, means over the languages, nats/token", head, rows)


def against_control(inputs: ReportInputs) -> Table:
    """Own features against random ones: the two differences with their intervals."""
    rows: dict[str, list[str]] = {}
    for row in data.against_control(inputs).rows(named=True):
        cells = rows.setdefault(row["language"], [row["language"]])
        cells += [plain(row["value"], 4, sign=True), _interval(row["low"], row["high"])]
    head = ["language", "own - random", "95 %", "own - others, less random's", "95 % "]
    return Table("Against random features that fire as often, nats/token", head, list(rows.values()))


def similarity(inputs: ReportInputs) -> Table:
    """The pairs of languages that have most features in common."""
    frame = data.similarity(inputs).filter(pl.col("value").is_not_null())
    place = {name: number for number, name in enumerate(inputs.languages)}
    rows = [
        [first, second, plain(value, 3), plain(units), kin or NONE]
        for first, second, value, units, kin in frame.select("language", "other", "value", "units", "expected").rows()
        if place[first] < place[second]
    ]
    rows.sort(key=lambda row: (-float(row[2]), place[row[0]], place[row[1]]))
    head = ["language", "and", "Jaccard index", "features of both", "relatives"]
    return Table("Features that two languages have in common", head, rows, labels=2)


def shared(inputs: ReportInputs) -> Table:
    """How many features belong to how many languages."""
    found = {k: inputs.figure("score", f"shared_by/{k}") for k in range(1, len(inputs.languages) + 1)}
    rows = [[str(k), plain(count)] for k, count in found.items()]
    return Table("Features by the number of languages that share them", ["languages", "features"], rows)


def identified(inputs: ReportInputs) -> Table:
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


def confusion(inputs: ReportInputs) -> Table:
    """Texts that were taken for another language."""
    wrong = data.confusion(inputs).filter(pl.col("language") != pl.col("predicted"), pl.col("texts") > 0)
    rows = [[m, a, b, plain(n), percent(v)] for m, a, b, n, v in wrong.rows()]
    head = ["method", "text in", "taken for", "texts", "of that language's"]
    return Table("Texts that were taken for another language", head, rows or [["none", *[NONE] * 4]], labels=3)


def steering(inputs: ReportInputs) -> Table:
    """Steered text per language and strength."""
    rows = [
        [language, significant(strength), percent(success), plain(nll, 2), plain(distinct, 2)]
        for language, strength, success, nll, distinct in data.steering(inputs)
        .select("language", "strength", "success", "nll", "distinct_2")
        .rows()
    ]
    head = ["language", "strength", "success", "NLL (nats/token)", "distinct-2"]
    return Table("Steered text; strength 0 is the unsteered model", head, rows)


def fvu(inputs: ReportInputs) -> Table:
    """FVU per language and hookpoint."""
    return Table(
        "FVU per language and hookpoint", ["language", *inputs.hookpoints], _wide(data.fvu_by_language(inputs), 3)
    )


def quality(inputs: ReportInputs) -> Table:
    """The SAEs: how well each reconstructs, how sparse it is, how much of it is dead."""
    rows = []
    for hookpoint in inputs.hookpoints:
        get = inputs.metrics.get(f"train.{hookpoint}", {}).get
        recovered = inputs.figure("quality", f"loss_recovered/{hookpoint}")
        dead, tokens = percent(get("dead_share")), plain(get("tokens"))
        again = [inputs.figure("stability", f"stability_share{end}/{hookpoint}") for end in ("", "_others")]
        found = f"{percent(again[0])} ({percent(again[1])})" if again[0] is not None else NONE
        rows.append([hookpoint, plain(get("fvu"), 3), plain(get("l0"), 1), dead, percent(recovered), found, tokens])
    head = ["hookpoint", "FVU", "L0", "dead latents", "loss recovered", "features found again", "tokens trained on"]
    return Table("One SAE per hookpoint", head, rows)


def corpus(inputs: ReportInputs) -> Table:
    """Tokens and texts per language and split."""
    keys = ("train_tokens", "train_texts", "eval_tokens", "eval_texts")
    rows = [[lang, *(plain(inputs.figure("sample", f"{key}/{lang}")) for key in keys)] for lang in inputs.languages]
    return Table("Corpus", ["language", "train tokens", "train texts", "eval tokens", "eval texts"], rows)


def metrics(inputs: ReportInputs) -> Table:
    """Every figure of every metrics file."""
    rows = [
        [name, key, significant(value, digits=6) if isinstance(value, float) else plain(value)]
        for name, content in sorted(inputs.metrics.items())
        for key, value in sorted(content.items())
    ]
    return Table("Every figure of every stage (metrics/*.json)", ["stage", "figure", "value"], rows, labels=2)


def pairs(caption: str, head: list[str], content: Mapping[str, str]) -> Table:
    """A table of names and values."""
    return Table(caption, head, [[key, value] for key, value in sorted(content.items())], labels=2)
