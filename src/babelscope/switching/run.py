"""Stage `switching`: a language's features where a sentence switches to it, and what removing them does there."""

import logging

import polars as pl

from babelscope.config import Config
from babelscope.core import stage
from babelscope.core.files import read_table, write_atomically, write_json
from babelscope.core.paths import Paths
from babelscope.switching.schemas import CHANGES, PAIR_SCHEMA, POSITION_SCHEMA

log = logging.getLogger(__name__)


def run(params: Config, paths: Paths) -> None:
    """Write the tables below `paths.switching` and the stage's metrics; without rows if `switching.groups` is 0."""
    pairs, positions, numbers = (
        pl.DataFrame(schema=PAIR_SCHEMA),
        pl.DataFrame(schema=POSITION_SCHEMA),
        dict[str, float](),
    )
    if params.switching.groups:
        features = read_table(paths.features).filter(kind="sae").select("hookpoint", "unit", "language")
        if features["language"].n_unique() > 1:
            from babelscope.switching.measure import measure  # its imports take seconds, and by default it is off

            pairs, positions, numbers = measure(features, params, paths)
    write_atomically(paths.switching / "pairs.parquet", pairs.write_parquet)
    write_atomically(paths.switching / "positions.parquet", positions.write_parquet)
    write_json(paths.metrics("switching"), numbers)
    if positions.is_empty():
        log.info("switching: nothing to measure (params.yaml: switching.groups is 0, or no features of two languages)")
    rows = pairs.group_by("other", maintain_order=True).agg(pl.col(CHANGES).mean()).rows()
    if rows:
        stage.table(["switch to", *CHANGES], [[name, *(f"{x:+.3f}" for x in values)] for name, *values in rows])
