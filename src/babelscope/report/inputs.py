"""What the report is given, and the grid of languages and hookpoints that most of its sections fill."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import polars as pl

from babelscope.core.errors import UserError
from babelscope.models.names import parts_of

_NLL = ("method", "kind", "ablated", "control", "evaluated", "nll", "tokens", "delta", "low", "high")
_CONTROL = ("excess", "excess_low", "excess_high", "contrast", "contrast_low", "contrast_high")
COLUMNS = {
    "features": ("kind", "hookpoint", "layer", "unit", "language", "probability", "entropy", "rank"),
    "nll": _NLL,
    "by_layer": (*_NLL, "hookpoint"),
    "control": ("method", "language", *_CONTROL),
    "confusion": ("method", "normalize", "language", "predicted", "texts"),
    "generations": ("language", "strength", "control", "nll", "distinct_2", "success"),
    "similarity": ("language", "other", "units", "jaccard"),
}


@dataclass(frozen=True)
class ReportInputs:
    """Everything that the page shows. The frames are the pipeline's tables, as docs/contracts.md describes them.

    Parameters
    ----------
    params: the sections of params.yaml that decide the results (no `hardware`), shown as YAML; `languages` and
        `hookpoints` set the order of rows and columns.
    features: `data/scores/features.parquet`; a language without features has no row, or one whose unit is null.
    nll: `data/ablation/nll.parquet`, in nats/token.
    by_layer: `data/ablation/by_layer.parquet` (each hookpoint ablated alone), or None.
    metrics: `metrics/<name>.json` by `<name>`; any key may be missing.
    files: MD5 of the input files by path.
    versions: version by package.
    control: `data/ablation/control.parquet`, or None.
    confusion: `data/identify/confusion.parquet`, or None.
    generations: `data/steer/generations.parquet`, or None.
    similarity: `data/scores/similarity.parquet`, or None.

    Raises
    ------
    UserError: a frame lacks a column.
    """

    params: Mapping[str, Any]
    features: pl.DataFrame
    nll: pl.DataFrame
    by_layer: pl.DataFrame | None
    metrics: Mapping[str, Mapping[str, Any]]
    files: Mapping[str, str]
    versions: Mapping[str, str]
    control: pl.DataFrame | None = None
    confusion: pl.DataFrame | None = None
    generations: pl.DataFrame | None = None
    similarity: pl.DataFrame | None = None

    def __post_init__(self) -> None:
        for name, columns in COLUMNS.items():
            frame = getattr(self, name)
            missing = [] if frame is None else [column for column in columns if column not in frame.columns]
            if missing:
                has = ", ".join(frame.columns)
                raise UserError(f"{name}.parquet: no column {', '.join(missing)}; the columns are {has}")

    @property
    def languages(self) -> list[str]:
        """The languages, in the order of params.yaml."""
        return list(self.params["languages"])

    @property
    def hookpoints(self) -> list[str]:
        """The hookpoints, in the order of params.yaml."""
        return list(self.params["hookpoints"])

    @property
    def members(self) -> int:
        """To how many languages every feature belongs."""
        return int(self.params.get("score", {}).get("members", 1))

    def figure(self, name: str, key: str) -> Any:
        """The figure `key` of `metrics/<name>.json`, or None if there is none."""
        return self.metrics.get(name, {}).get(key)

    def grid(self) -> pl.DataFrame:
        """Every pair of `language` and `hookpoint` in the order of params.yaml, with the axis label `layer`."""
        labels = layer_labels(self.hookpoints)
        columns = pl.DataFrame({"hookpoint": self.hookpoints, "layer": list(labels.values())})
        return pl.DataFrame({"language": self.languages}).join(columns, how="cross", maintain_order="left_right")


def layer_labels(hookpoints: list[str]) -> dict[str, str]:
    """Short names for an axis: the number of the layer if no two hookpoints share it, else the whole name."""
    found = {name: parts_of(name) for name in hookpoints}
    numbers = {name: str(parts[0]) for name, parts in found.items() if parts is not None}
    return numbers if len(set(numbers.values())) == len(hookpoints) else {name: name for name in hookpoints}
