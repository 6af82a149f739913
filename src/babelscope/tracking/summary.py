"""The content of a state's summary run: figures, series over the layers, a table of the languages."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from babelscope.config.values import model_title
from babelscope.core.files import read_json, read_table
from babelscope.core.paths import Paths
from babelscope.models.names import parts_of
from babelscope.report.numbers import percent, plain, significant
from babelscope.tracking import view

Metrics = Mapping[str, Mapping[str, Any]]  # the content of metrics/<name>.json by <name>: `<stage>[.<hookpoint>]`
Figures = dict[str, float]
Series = dict[tuple[str, int], float]  # by name and layer

# Matches names of removed hookpoints in files that are older than their removal.
_HOOKPOINT_LIKE = re.compile(r"\.\d+(\.|$)")


def read_metrics(folder: Path) -> Metrics:
    """The content of every `<name>.json` in `folder`, by `<name>`."""
    return {path.stem: read_json(path) for path in sorted(folder.glob("*.json"))}


def numbers(paths: Paths, params: Mapping[str, Any], metrics: Metrics) -> tuple[Figures, Series]:
    """All figures and series of a state, from `metrics` and, if they exist, the tables of features and ablation.

    The figures of `summary.json` have their own names, also if a stage has the key.
    """
    languages, hookpoints = params["languages"], params["hookpoints"]
    stages = {name: content for name, content in metrics.items() if name != "summary"}
    single, series = figures(stages, hookpoints, params.get("neurons", {}).get("hookpoints", []))
    single |= metrics.get("summary", {})
    series |= {(view.X_AXIS, layer): layer for layer, _ in layers(hookpoints).values()}
    if count := metrics.get("extract", {}).get("layers"):
        # The share of the model's layers: models of other depths can be compared over it.
        series |= {("depth", layer): layer / count for layer, _ in layers(hookpoints).values()}
    if paths.features.is_file():
        of_features = feature_figures(read_table(paths.features), languages, hookpoints)
        single, series = single | of_features[0], series | of_features[1]
    if (path := paths.ablation / "by_layer.parquet").is_file():
        method = metrics.get("ablate", {}).get("primary_method", "feature")
        series |= ablation_series(read_table(path), languages, hookpoints, method)
    return single, series


def figures(metrics: Metrics, hookpoints: Sequence[str], neurons: Sequence[str] = ()) -> tuple[Figures, Series]:
    """Split the numbers of `metrics/*.json` into single figures and series over the layers.

    Parameters
    ----------
    hookpoints: the current ones; the files of removed hookpoints are left out.
    neurons: the current `neurons.hookpoints`, which keys may name as well (`neuron/own_alone/<hookpoint>`).

    Returns
    -------
    The figures by name: the key, with the stage after it (`tokens/sample`) if several stages have the key.
    The series by name and layer: `fvu` of `train.<hookpoint>` is `fvu_by_layer`, `fvu/en` is `fvu_by_layer/en`, and
    a key that contains a hookpoint (`own_alone/<hookpoint>`, `loss_recovered/<hookpoint>/en`) becomes a series, too.
    """
    single: dict[tuple[str, str], float] = {}
    by_layer: dict[tuple[str, str], Series] = {}
    # Two calls: an SAE and neurons of the same layer do not share a series.
    positions = layers(hookpoints) | layers(neurons)
    for name, content in metrics.items():
        stage, _, owner = name.partition(".")
        if owner and owner not in positions:
            continue
        for key, value in content.items():
            if isinstance(value, bool | str | None) or not math.isfinite(value) or key == "layer":
                continue
            parts = key.split("/")
            # The hookpoint of a figure: the file's, or one that the key names after its first part.
            index = next((i for i, part in enumerate(parts) if i and part in positions), 0)
            if owner or index:
                layer, part = positions[owner or parts[index]]
                head, tail = "/".join(parts[: index or 1]), "/".join(parts[index + 1 :])
                by_layer.setdefault((stage, head), {})[_series(head, part, tail), layer] = value
            elif stage == "sample" or not any(_HOOKPOINT_LIKE.search(part) for part in parts[1:]):
                single[stage, key] = value  # the keys of `sample` name sources, which may look like hookpoints
    shared = _shared(single), _shared(by_layer)
    return (
        {f"{key}/{stage}" if key in shared[0] else key: value for (stage, key), value in single.items()},
        {
            (f"{key}/{stage}" if name in shared[1] else key, layer): value
            for (stage, name), series in by_layer.items()
            for (key, layer), value in series.items()
        },
    )


def layers(hookpoints: Sequence[str]) -> dict[str, tuple[int, str]]:
    """The layer of each hookpoint, and its part (`mlp`, `residual`) if hookpoints share a layer, else ""."""
    found: dict[str, tuple[int, str]] = {}
    for hookpoint in hookpoints:
        parts = parts_of(hookpoint)
        found[hookpoint] = (parts[0], parts[1] or "residual") if parts else (0, hookpoint)
    crowded = len({layer for layer, _ in found.values()}) < len(found)
    return {hookpoint: (layer, part if crowded else "") for hookpoint, (layer, part) in found.items()}


def feature_figures(
    features: pl.DataFrame, languages: Sequence[str], hookpoints: Sequence[str]
) -> tuple[Figures, Series]:
    """Numbers of features: `features/<language>` in total, `features_by_layer/<language>` in each layer.

    `features_by_layer/all` counts every unit once.

    Parameters
    ----------
    features: `data/scores/features.parquet`; a language without units may have a row with a null unit.
    """
    chosen = features.filter(pl.col("kind") == "sae", pl.col("unit").is_not_null())
    counts = Counter(chosen.select("hookpoint", "language").iter_rows())
    units = Counter(name for name, _ in set(chosen.select("hookpoint", "unit").iter_rows()))
    series: Series = {}
    for hookpoint, (layer, part) in layers(hookpoints).items():
        series[_series("features", part, "all"), layer] = units[hookpoint]
        series |= {(_series("features", part, name), layer): counts[hookpoint, name] for name in languages}
    return {f"features/{name}": sum(counts[hookpoint, name] for hookpoint in hookpoints) for name in languages}, series


def ablation_series(by_layer: pl.DataFrame, languages: Sequence[str], hookpoints: Sequence[str], method: str) -> Series:
    """Cost in nats/token of ablating a language's features at one layer: `dnll_own_by_layer/<language>`.

    Parameters
    ----------
    by_layer: `data/ablation/by_layer.parquet`.
    method: `primary_method` of `metrics/ablate.json`, whose rows are shown.
    """
    own = by_layer.filter(
        pl.col("method") == method, pl.col("ablated") == pl.col("evaluated"), pl.col("control").is_null()
    )
    positions = layers(hookpoints)
    return {
        (_series("dnll_own", positions[hookpoint][1], language), positions[hookpoint][0]): delta
        for hookpoint, language, delta in own.select("hookpoint", "ablated", "delta").iter_rows()
        if hookpoint in positions and language in languages and delta is not None and math.isfinite(delta)
    }


def language_table(values: Figures, languages: Sequence[str]) -> dict[str, list[Any]]:
    """The figures that every language has, as columns: `features/<language>` becomes the column `features`."""
    names = [key.removesuffix(f"/{languages[0]}") for key in values if key.endswith(f"/{languages[0]}")]
    columns = {
        name: [values[f"{name}/{language}"] for language in languages]
        for name in names
        if all(f"{name}/{language}" in values for language in languages)
    }
    # The main figures come first.
    first = [name for name in ("features", "effective_languages", "dnll_own") if name in columns]
    return {"language": list(languages)} | {name: columns[name] for name in dict.fromkeys([*first, *sorted(columns)])}


def note(params: Mapping[str, Any], metrics: Metrics, state_hash: str) -> str:
    """A description of the run in a few lines, with the figures of the report's headline."""
    score, ablate, known = (metrics.get(name, {}) for name in ("score", "ablate", "summary"))
    members = params["score"]["members"]
    kind = "language-specific features" if members == 1 else f"features shared by exactly {members} languages"
    sentences = [
        f"{plain(score.get('features'))} {kind} of {len(params['languages'])} languages"
        f" at {len(params['hookpoints'])} hookpoints."
    ]
    if "effective_languages" in score:
        value = plain(score["effective_languages"], 2)
        sentences.append(f"Effective languages of a feature (exp of the mean entropy): {value}.")
    if {"own", "others_abs"} <= set(ablate):
        sentences.append(
            f"Ablating a language's features changes its loss by {significant(ablate['own'], sign=True)} nats/token,"
            f" each other language's by {significant(ablate['others_abs'], digits=2)} on average (absolute value)."
        )
    if "dnll_control" in known:
        sentences.append(f"Random latents that fire as often: {significant(known['dnll_control'], sign=True)}.")
    if "matched" in known:
        sentences.append(f"Found one to one in an SAE from another seed: {percent(known['matched'])}.")
    # Quoted as code: MLflow shows a note as Markdown, in which a name could load an image.
    model = " ".join(model_title(params["model"]).replace("`", "'").split())
    return (
        f"`{model}`: {' '.join(sentences)}\n\n"
        f"DVC state `{state_hash}`; its dvc.lock and params.yaml are among the artifacts."
    )


def _series(name: str, part: str, rest: str = "") -> str:
    return "/".join(filter(None, (f"{name}_by_layer", part, rest)))


def _shared(keys: Mapping[tuple[str, str], Any]) -> set[str]:
    """The keys that more than one stage has."""
    return {key for key, count in Counter(key for _, key in keys).items() if count > 1}
