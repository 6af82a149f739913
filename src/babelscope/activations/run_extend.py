"""Stage `extend`: activations of the languages that train no SAE (`corpus.train_languages`), if there are any."""

import logging

import polars as pl

from babelscope.activations.rows import SCHEMA
from babelscope.config import Config
from babelscope.core.files import read_table, write_atomically
from babelscope.core.paths import Paths

log = logging.getLogger(__name__)


def run(params: Config, paths: Paths) -> None:
    """Write `paths.extended`; its token table has no rows if all languages train."""
    trained = read_table(paths.train_texts, columns=["language"])["language"].unique()
    corpus = read_table(paths.texts).filter(~pl.col("language").is_in(trained.implode()))
    if corpus.is_empty():
        log.info("extend: nothing to do (all languages train the SAEs; params.yaml: corpus.train_languages)")
        write_atomically(paths.extended_tokens, pl.DataFrame(schema=SCHEMA).write_parquet)
        return
    from babelscope.activations.run import store_pass  # its imports take seconds, and most runs do not need them

    store_pass(params, corpus, paths.extended_tokens, "extend", [paths.texts, paths.train_texts])
