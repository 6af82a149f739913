"""Stage `sharing`: how many latents a text shares with its translations, layer by layer."""

import logging
import math

import numpy as np
import polars as pl
from numpy.typing import NDArray

from babelscope.activations.rows import read_rows
from babelscope.config import Config
from babelscope.core import stage
from babelscope.core.errors import UserError
from babelscope.core.files import read_table, write_atomically, write_json
from babelscope.core.paths import Paths
from babelscope.core.progress import Progress
from babelscope.features import sharing, typology
from babelscope.models.names import layer_of

SCHEMA = pl.Schema({
    "hookpoint": pl.String, "layer": pl.Int32, "language": pl.String, "other": pl.String, "groups": pl.Int64,
    "translations": pl.Float64, "random": pl.Float64, "typology": pl.Float64,
})  # fmt: skip
log = logging.getLogger(__name__)


def run(params: Config, paths: Paths) -> None:
    """Write `paths.sharing` and the stage's metrics; without rows if `sharing.groups` is 0."""
    parts = [pl.DataFrame(schema=SCHEMA)]
    numbers: dict[str, float] = {}
    if params.sharing.groups:
        from babelscope.features.on_texts import measure  # its imports take seconds, and by default it is off

        texts = sharing.parallel_texts(read_table(paths.texts), params.languages, params.sharing.groups)
        if texts.is_empty():
            raise UserError(
                f"params.yaml: sharing.groups: {paths.texts} has no text in two languages (translations of each other "
                "share a `group`); set it to 0"
            )
        tokens = read_rows(paths, columns=["row", "text_id"]).join(
            texts.with_row_index("text").select("text_id", pl.col("text").cast(pl.Int64)), on="text_id"
        )
        tokens = tokens.sort("text", "row")
        far = distances(params.languages)
        numbers["groups"] = texts["group"].n_unique()
        numbers["texts"] = len(texts)
        with Progress("sharing", len(tokens) * len(params.hookpoints), "tokens") as progress:
            for hookpoint in params.hookpoints:
                fires, means = measure(params, paths, hookpoint, tokens, texts, progress)
                pairs = sharing.overlaps(fires, texts, params.languages)
                pairs = pairs.join(far, on=["language", "other"], how="left", maintain_order="left")
                pairs = pairs.with_columns(hookpoint=pl.lit(hookpoint), layer=pl.lit(layer_of(hookpoint)))
                parts.append(pairs.select(pl.col(name).cast(dtype) for name, dtype in SCHEMA.items()))
                numbers |= figures(parts[-1], means, hookpoint)
    table = pl.concat(parts)
    write_atomically(paths.sharing, table.write_parquet)
    write_json(paths.metrics("sharing"), numbers)
    names = ("jaccard_translations", "jaccard_random", "first_component")
    rows = [[at, *(f"{numbers.get(f'{name}/{at}', math.nan):.3f}" for name in names)] for at in params.hookpoints]
    if params.sharing.groups:
        stage.table(["hookpoint", "Jaccard of translations", "of random pairs", "first component"], rows)
    else:
        log.info("sharing: nothing to compare (params.yaml: sharing.groups is 0)")


def distances(languages: list[str]) -> pl.DataFrame:
    """`language`, `other`, `typology` of every pair that lang2vec's database has; without rows if it is missing."""
    found = typology.distances(languages)
    rows = [
        (first, second, float(found[i, j]))
        for i, first in enumerate(languages)
        for j, second in enumerate(languages)
        if found is not None and i < j and np.isfinite(found[i, j])
    ]
    return pl.DataFrame(rows, schema={name: SCHEMA[name] for name in ("language", "other", "typology")}, orient="row")


def figures(pairs: pl.DataFrame, means: NDArray[np.float64], hookpoint: str) -> dict[str, float]:
    """The numbers of one hookpoint; one that is not defined is missing."""
    excess = pairs["translations"] - pairs["random"]
    found = {
        "jaccard_translations": pairs["translations"].mean(),
        "jaccard_random": pairs["random"].mean(),
        "first_component": sharing.first_component(means),
        "typology_correlation": sharing.rank_correlation(excess, pairs["typology"]),
    }
    return {
        f"{name}/{hookpoint}": value
        for name, value in found.items()
        if isinstance(value, float) and math.isfinite(value)
    }
