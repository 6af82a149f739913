"""The page: pictures, tables and their explanations, as one HTML file that needs nothing else."""

from typing import Any

import jinja2
import yaml

from babelscope.config.values import local_name
from babelscope.report import charts, data, tables
from babelscope.report.assets import asset, source_hash
from babelscope.report.data import ReportInputs
from babelscope.report.numbers import percent, plain, significant


def for_dvc() -> str:
    """The page that `dvc plots` fills (`.dvc/config`); DVC's own fetches Vega from a network each time it is opened."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>Babelscope: dvc plots</title>
{{refresh_tag}}
<script>(() => {{{charts.javascript()}}})();</script>
<style>
body {{ font: 14px system-ui, sans-serif; margin: 1.5rem; }}
body > div {{ margin-bottom: 2rem; overflow-x: auto; }}
</style>
</head>
<body>
{{plot_divs}}
</body>
</html>
"""


def pictures(inputs: ReportInputs) -> dict[str, Any]:
    """The charts of the page by name; a chart without data is left out."""
    result = {
        "features": charts.features_by_layer(data.counts(inputs)),
        "ablation": charts.ablation(data.matrix(inputs), inputs.languages),
        "own": charts.own_and_others(data.own_and_others(inputs)),
    }
    by_layer = data.own_by_layer(inputs)
    if not by_layer.is_empty():
        result["layers"] = charts.own_by_layer(by_layer, data.by_hookpoint(by_layer))
    for name, find, draw in (
        ("control", data.against_control, charts.against_control),
        ("similarity", data.similarity, charts.similarity),
        ("confusion", data.confusion, charts.confusion),
        ("steering", data.steering, charts.steering),
    ):
        frame = find(inputs)
        if not frame.is_empty():
            result[name] = draw(frame)
    fvu = data.fvu_by_language(inputs)
    if not fvu.is_empty():
        result["fvu"] = charts.heat_map(
            fvu, name="fvu", title="FVU", decimals=2, zero=False,
            description="Fraction of variance that the SAEs leave unexplained; the table holds the same figures.",
        )  # fmt: skip
    return result


def _headline(inputs: ReportInputs) -> dict[str, str]:
    """The figures at the top of the page, as text."""
    figure, count = inputs.figure, len(inputs.languages)

    def of_all(key: str) -> str:
        value = figure("ablate", key)
        return "" if value is None else f"{plain(value)} of {count}"

    return {
        "features": plain(data.found(inputs)),
        "effective": plain(figure("score", "effective_languages"), 2),
        "with_features": plain(data.features(inputs)["language"].n_unique()),
        "tokens": plain(figure("extract", "tokens") or figure("sample", "tokens")),
        "texts": plain(figure("extract", "texts") or figure("sample", "texts")),
        "padding": percent(figure("extract", "padding_share")),
        "fvu": plain(data.mean_fvu(inputs), 3),
        "own": significant(figure("ablate", "own"), sign=True),
        "others": significant(figure("ablate", "others"), sign=True, digits=2),
        "others_abs": significant(figure("ablate", "others_abs"), digits=2),
        "ratio": significant(figure("ablate", "ratio")),
        "rows": f"{plain(figure('ablate', 'rows'))} of {count}",
        "rows_above_zero": f"{plain(figure('ablate', 'rows_above_zero'))} of {count}",
        "columns": f"{plain(figure('ablate', 'columns'))} of {count}",
        "accuracy": percent(figure("identify", "accuracy/sae-count/units")),
        "accuracy_fasttext": percent(figure("identify", "accuracy/fasttext/none")),
        "identified": plain(figure("identify", "texts")),
        "unidentified": ", ".join(data.unidentified(inputs)),
        "success": percent(figure("steer", "success")),
        "success_unsteered": percent(figure("steer", "success_unsteered")),
        "above": of_all("languages_above_control"),
        "selective": of_all("languages_selective"),
    }


def build(inputs: ReportInputs) -> str:
    """The report as one HTML page: the same inputs give the same text.

    Scripts, styles, charts and data are inside; nothing is fetched, and a Content-Security-Policy forbids it. Every
    text from the inputs is escaped.
    """
    specs = {name: charts.spec(chart) for name, chart in pictures(inputs).items()}
    scripts = [charts.javascript(), asset("page.js")]
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    behind = {
        "counts": tables.counts(inputs), "top": tables.top_features(inputs), "cells": tables.ablation_cells(inputs),
        "rows": tables.ablation_rows(inputs), "quality": tables.quality(inputs), "corpus": tables.corpus(inputs),
        "metrics": tables.metrics(inputs),
        "files": tables.pairs("Input files", ["file", "MD5"], inputs.files),
        "versions": tables.pairs("Packages", ["package", "version"], inputs.versions),
    }  # fmt: skip
    if "layers" in specs:
        behind |= {"layers": tables.own_by_layer(inputs), "selective": tables.by_hookpoint(inputs)}
    made = {
        "control": tables.against_control,
        "similarity": tables.similarity,
        "confusion": tables.confusion,
        "steering": tables.steering,
    }
    behind |= {name: table(inputs) for name, table in made.items() if name in specs}
    if "similarity" in specs:
        behind["shared"] = tables.shared(inputs)
    if "confusion" in specs:
        behind["identified"] = tables.identified(inputs)
    if "fvu" in specs:
        behind["fvu"] = tables.fvu(inputs)
    return environment.from_string(asset("page.html.j2")).render(
        policy=" ".join(source_hash(script) for script in scripts),
        scripts=scripts,
        style=asset("page.css"),
        charts={"specs": specs, "themes": charts.THEMES},
        tables=behind,
        headline=_headline(inputs),
        likeness={kind: plain(value, 2) for kind, value in data.likeness(inputs).items()},
        inputs=inputs,
        method=data.ablation_method(inputs),
        params=yaml.safe_dump(dict(inputs.params), sort_keys=False, allow_unicode=True, width=1000),
        members=inputs.params.get("score", {}).get("members", 1),
        ratio=inputs.params.get("score", {}).get("ratio"),
        model=local_name(inputs.params.get("model", {}).get("name", "the model")),
    )
