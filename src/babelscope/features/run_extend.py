"""Stage `extend`: the counts of all languages, also of those that train no SAE (`corpus.train_languages`).

What the languages that train SAEs need comes from `extract` and `encode`, which do not run when another is added.
"""

import logging

import polars as pl

from babelscope.activations.rows import SCHEMA
from babelscope.config import Config
from babelscope.core.files import read_table, write_atomically, write_json
from babelscope.core.paths import Paths

log = logging.getLogger(__name__)


def run(params: Config, paths: Paths) -> None:
    """Write `paths.all_counts`, `paths.extended` (without rows if all languages train) and the stage's metrics."""
    trained = read_table(paths.encoded(params.hookpoints[0])[1])["language"].to_list()
    added = [name for name in params.languages if name not in trained]
    if added:
        corpus = read_table(paths.texts).filter(pl.col("language").is_in(added))
        from babelscope.activations.run import store_pass  # its imports take seconds, and most runs do not need them

        if not store_pass(params, corpus, paths.extended_tokens, "extend", paths.texts):
            return
    else:
        log.info("extend: no language to add (params.yaml: corpus.train_languages)")
        write_atomically(paths.extended_tokens, pl.DataFrame(schema=SCHEMA).write_parquet)
    numbers: dict[str, float] = {}
    order = pl.col("language").cast(pl.Enum(params.languages))
    for hookpoint in params.hookpoints:
        tables = [read_table(path) for path in paths.encoded(hookpoint)]
        if added:
            from babelscope.features.run_encode import count_added

            more, figures = count_added(hookpoint, added, params, paths)
            tables = [pl.concat(pair) for pair in zip(tables, more, strict=True)]
            numbers |= figures
        for table, path in zip(tables, (paths.counts(hookpoint), paths.totals(hookpoint)), strict=True):
            kept = table.filter(pl.col("language").is_in(params.languages)).sort(order, maintain_order=True)
            write_atomically(path, kept.write_parquet)
    write_json(paths.metrics("extend"), numbers)
