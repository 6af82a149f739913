"""What the feature browser's pages on a language and on a hookpoint say beside the features."""

from typing import Any

import polars as pl

from babelscope.report.names import name
from babelscope.report.numbers import NONE, percent, plain, significant
from babelscope.report.parts import ReportInputs
from babelscope.report.sections import control, identification, layers, own, similarity

# A label and a figure as text.
Facts = list[tuple[str, str]]
# Figures by language of metrics/<name>.json that need no more than their key: (name, key, label, how to write it).
_BY_LANGUAGE = (
    ("score", "effective_languages_median", "effective languages of a feature, median", lambda v: plain(v, 2)),
    ("stability", "features_matched_share", "of its features match one by one in another seed", percent),
    ("stability", "write_cosine", "cosine of what its features write, with another seed", lambda v: plain(v, 3)),
    ("identify", "f1/sae-count/units", "F1 of identifying it by its features", percent),
    ("identify", "f1/fasttext/none", "F1 of fastText", percent),
    ("sample", "train_tokens", "training tokens", plain),
    ("sample", "eval_tokens", "held-out tokens", plain),
)
_BY_HOOKPOINT = (
    ("train", "fvu", "FVU (fraction of variance unexplained)", lambda v: plain(v, 3)),
    ("train", "dead_share", "dead latents", percent),
)


def about(inputs: ReportInputs) -> dict[str, Facts]:
    """The facts by language and by hookpoint; figures that are not known are left out."""
    return {language: _language(inputs, language) for language in inputs.languages} | {
        hookpoint: _hookpoint(inputs, hookpoint) for hookpoint in inputs.hookpoints
    }


def _language(inputs: ReportInputs, language: str) -> Facts:
    row = own.own_and_others(inputs).row(by_predicate=pl.col("language") == language, named=True)
    draws = row["random"], row["random_low"], row["random_high"]
    facts = [
        ("ΔNLL of itself without them, nats/token", _with_interval(row["own"], row["low"], row["high"])),
        ("the same in bits/byte", significant(row["bits"], sign=True)),
        ("ΔNLL of the other languages, mean", significant(row["others"], sign=True, digits=2)),
        ("ΔNLL without random latents that fire as often", _with_interval(*draws, "range of the draws")),
    ]
    against = control.against_control(inputs)
    if not against.is_empty():
        cell = against.row(by_predicate=(pl.col("language") == language) & (pl.col("question") == "own"), named=True)
        facts.append(("own minus random latents", _with_interval(cell["value"], cell["low"], cell["high"])))
    facts = [(label, text) for label, text in facts if text != NONE]
    facts += _figures(inputs, _BY_LANGUAGE, language)
    pairs = similarity.similarity(inputs)
    if not pairs.is_empty():
        near = pairs.filter(pl.col("language") == language).drop_nulls("value").sort("value", descending=True).head(3)
        shared = ", ".join(f"{name(o)} {percent(v, 0)}" for o, v in near.select("other", "value").rows())
        facts.append(("features in common (Jaccard index)", shared))
    wrong = identification.confusion(inputs)
    if not wrong.is_empty():
        lost = wrong.filter(
            pl.col("language") == language, pl.col("predicted") != language, pl.col("texts") > 0, method="features"
        )
        taken = ", ".join(f"{name(o)} ({n})" for o, n in lost.select("predicted", "texts").rows())
        facts.append(("held-out texts identified as another language", taken or "none"))
    return facts


def _hookpoint(inputs: ReportInputs, hookpoint: str) -> Facts:
    facts = _figures(inputs, _BY_HOOKPOINT, hookpoint, f".{hookpoint}")
    recovered = inputs.figure("quality", f"loss_recovered/{hookpoint}")
    facts.append(("loss recovered with the SAE’s reconstruction", percent(recovered)))
    frame = layers.own_by_layer(inputs)
    if not frame.is_empty():
        means = layers.selectivity(frame).row(by_predicate=pl.col("hookpoint") == hookpoint, named=True)
        facts.append(("ΔNLL of the language itself, removed alone, mean", significant(means["own"], sign=True)))
        if means["rows"] is not None:
            facts.append(("languages that lose most themselves", f"{means['rows']} of {len(inputs.languages)}"))
    return [(label, text) for label, text in facts if text != NONE]


def cells(inputs: ReportInputs) -> dict[str, dict[str, str]]:
    """The effect of a language's features at one hookpoint alone: text by language and hookpoint."""
    frame = layers.own_by_layer(inputs)
    rows = [] if frame.is_empty() else frame.drop_nulls("value").iter_rows(named=True)
    found: dict[str, dict[str, str]] = {}
    for row in rows:
        text = _with_interval(row["value"], row["low"], row["high"])
        found.setdefault(row["language"], {})[row["hookpoint"]] = text
    return found


def _figures(inputs: ReportInputs, keys: Any, at: str, end: str = "") -> Facts:
    """The known ones of `keys`: `<key>/<at>` of `<stage>.json`, or with `end` `<key>` of `<stage><end>.json`."""
    known = (
        (label, how, inputs.figure(f"{stage}{end}", key if end else f"{key}/{at}")) for stage, key, label, how in keys
    )
    return [(label, how(value)) for label, how, value in known if value is not None]


def _with_interval(value: float | None, low: float | None, high: float | None, kind: str = "95 %") -> str:
    text = significant(value, sign=True)
    if low is None or high is None:
        return text
    return f"{text} ({kind} {significant(low, sign=True)} to {significant(high, sign=True)})"
