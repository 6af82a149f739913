"""What the summary run of a pipeline state shows: figures, series over the layers, a table of the languages."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from babelscope.models.names import parts_of

Figures = dict[str, float]
Series = dict[tuple[str, int], float]


def figures(
    metrics: Mapping[str, Mapping[str, Any]], hookpoints: Sequence[str], neurons: Sequence[str] = ()
) -> tuple[Figures, Series]:
    """Split the numbers of `metrics/*.json` into single figures and series over the layers.

    Parameters
    ----------
    metrics: the content of `metrics/<name>.json` by `<name>`, which is a stage or `<stage>.<hookpoint>`.
    hookpoints: the current ones, whose files are read; those of removed hookpoints are left out.
    neurons: the current ones of `neurons.hookpoints`, which keys may name as well (`neuron/own_alone/<hookpoint>`).

    Returns
    -------
    The figures by name: the key, with the stage after it (`tokens/sample`) where several stages have the key.
    The series by name and layer: `fvu` of `train.<hookpoint>` is `fvu_by_layer`, `fvu/en` is `fvu_by_layer/en`, and
    a key of a stage that holds a hookpoint (`own_alone/<hookpoint>`, `loss_recovered/<hookpoint>/en`) is one as well.
    """
    single: dict[tuple[str, str], float] = {}
    by_layer: dict[tuple[str, str], Series] = {}
    # Apart from each other: a layer with an SAE and neurons is not one that two hookpoints of a series share.
    places = layers(hookpoints) | layers(neurons)
    for name, content in metrics.items():
        stage, _, owner = name.partition(".")
        if owner and owner not in places:
            continue
        for key, value in content.items():
            if (
                isinstance(value, bool)
                or not isinstance(value, int | float)
                or not math.isfinite(value)
                or key == "layer"
            ):
                continue
            parts = key.split("/")
            # Whose figure it is: the file's hookpoint, or one that the key names behind its first part.
            at = next((i for i, part in enumerate(parts) if i and part in places), None)
            if owner or at is not None:
                layer, part = places[owner or parts[at or 0]]
                head, tail = "/".join(parts[: at or 1]), "/".join(parts[at + 1 if at else 1 :])
                by_layer.setdefault((stage, head), {})[_series(head, part, tail), layer] = value
            elif stage == "sample" or not any(
                _HOOKPOINT_LIKE.search(part) for part in parts[1:]
            ):  # its keys name sources
                single[stage, key] = value
    shared = _shared(single), _shared(by_layer)
    return (
        {f"{key}/{stage}" if key in shared[0] else key: value for (stage, key), value in single.items()},
        {
            (f"{key}/{stage}" if name in shared[1] else key, layer): value
            for (stage, name), series in by_layer.items()
            for (key, layer), value in series.items()
        },
    )


# A removed hookpoint in a file that is older than its removal.
_HOOKPOINT_LIKE = re.compile(r"\.\d+(\.|$)")


def layers(hookpoints: Sequence[str]) -> dict[str, tuple[int, str]]:
    """The layer of each hookpoint, and what tells it apart where two share a layer (`mlp`, `residual`), else ""."""
    found: dict[str, tuple[int, str]] = {}
    for hookpoint in hookpoints:
        parts = parts_of(hookpoint)
        found[hookpoint] = (parts[0], parts[1] or "residual") if parts else (0, hookpoint)
    crowded = len({layer for layer, _ in found.values()}) < len(found)
    return {hookpoint: (layer, part if crowded else "") for hookpoint, (layer, part) in found.items()}


def feature_series(features: pl.DataFrame, languages: Sequence[str], hookpoints: Sequence[str]) -> Series:
    """How many features each language has in each layer, 0 where none: `features_by_layer/<language>` and `.../all`.

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
        for language in languages:
            series[_series("features", part, language), layer] = counts[hookpoint, language]
    return series


def feature_figures(features: pl.DataFrame, languages: Sequence[str], hookpoints: Sequence[str]) -> Figures:
    """How many features each language has over all hookpoints: `features/<language>`."""
    found = Counter(
        language
        for kind, hookpoint, unit, language in features.select("kind", "hookpoint", "unit", "language").iter_rows()
        if kind == "sae" and unit is not None and hookpoint in hookpoints
    )
    return {f"features/{language}": found[language] for language in languages}


def ablation_series(by_layer: pl.DataFrame, languages: Sequence[str], hookpoints: Sequence[str], method: str) -> Series:
    """What ablating a language's features at one layer costs it, nats/token: `dnll_own_by_layer/<language>`.

    Parameters
    ----------
    by_layer: `data/ablation/by_layer.parquet`.
    method: whose rows; `primary_method` of `metrics/ablate.json`.
    """
    own = by_layer.filter(
        pl.col("method") == method,
        pl.col("ablated") == pl.col("evaluated"),
        pl.col("control").is_null(),
    )
    places = layers(hookpoints)
    return {
        (_series("dnll_own", places[hookpoint][1], language), places[hookpoint][0]): delta
        for hookpoint, language, delta in own.select("hookpoint", "ablated", "delta").iter_rows()
        if hookpoint in places and language in languages and delta is not None and math.isfinite(delta)
    }


def language_table(values: Figures, languages: Sequence[str]) -> dict[str, list[Any]]:
    """The figures that every language has, as columns: `features/<language>` becomes the column `features`."""
    names = [key.removesuffix(f"/{languages[0]}") for key in values if key.endswith(f"/{languages[0]}")]
    columns = {
        name: [values[f"{name}/{language}"] for language in languages]
        for name in names
        if all(f"{name}/{language}" in values for language in languages)
    }
    # What the pipeline is about comes first.
    first = [name for name in ("features", "effective_languages", "dnll_own") if name in columns]
    return {"language": list(languages)} | {name: columns[name] for name in dict.fromkeys([*first, *sorted(columns)])}


def read_metrics(folder: Path) -> dict[str, dict[str, Any]]:
    """The content of every `<name>.json` in `folder`, by `<name>`."""
    from babelscope.core.files import read_json

    return {path.stem: read_json(path) for path in sorted(folder.glob("*.json"))}


def metric_name(key: str) -> str:
    """`key` with what MLflow does not allow in a metric's name replaced by `_`."""
    return re.sub(r"[^\w.\- :/]", "_", key)


def _series(name: str, part: str, rest: str = "") -> str:
    return "/".join(filter(None, (f"{name}_by_layer", part, rest)))


def _shared(keys: Mapping[tuple[str, str], Any]) -> set[str]:
    """The keys that more than one stage has."""
    return {key for key, count in Counter(key for _, key in keys).items() if count > 1}
