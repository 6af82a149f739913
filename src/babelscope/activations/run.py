"""Stage `extract`: activations at every hookpoint, from one forward pass over the texts that train the SAEs.

If `train.source` is `stream`, no activations are kept: only the token table and empty stores with the widths are
written.
"""

import logging
import shutil
from pathlib import Path

import polars as pl

from babelscope.activations import extraction, store
from babelscope.config import Config, check_folders
from babelscope.config.values import local_name
from babelscope.core import stage
from babelscope.core.files import move, read_table, write_atomically, write_json
from babelscope.core.fingerprint import dvc_md5, fingerprint
from babelscope.core.paths import Paths
from babelscope.core.resume import scratch
from babelscope.models import forward, hardware, hookpoints, loading, tokens

log = logging.getLogger(__name__)


def run(params: Config, paths: Paths) -> None:
    """Write `paths.activations` with `paths.tokens`, and the stage's metrics."""
    check_folders(params)
    numbers = store_pass(params, read_table(paths.train_texts), paths.tokens, "extract", paths.train_texts)
    if numbers:
        write_json(paths.metrics("extract"), numbers)


def store_pass(params: Config, corpus: pl.DataFrame, token_table: Path, name: str, source: Path) -> dict[str, float]:
    """Write the activations of the texts `corpus` at every hookpoint, and their token table.

    Parameters
    ----------
    token_table: the path of the token table, in whose folder the activations are.
    name: of the stage.
    source: the file in which the texts are.

    Returns
    -------
    The stage's figures; an empty dict in processes of the run other than the first.
    """
    hardware.prepare(params.hardware)
    loading.check_hookpoints(params.model, params.hookpoints)
    texts = tokens.tokenize_corpus(loading.load_tokenizer(params.model), corpus, params.corpus.max_tokens)
    shards = extraction.plan(texts, params.extract.batch_tokens)
    model = loading.load_model(params.model, params.extract.dtype)
    hookpoints.resolve(model, params.hookpoints)
    tokens.check_fits(model, texts)
    names = forward.names_to_read(params.hookpoints, params.train.transcode)
    widths = forward.widths(model, names)

    depends = params.model_dump(include={"hookpoints", "model", "extract"}) | {"max_tokens": params.corpus.max_tokens}
    depends |= {"transcode": params.train.transcode, "languages": corpus["language"].unique().sort().to_list()}
    resume = scratch(fingerprint(name, depends, {str(source): dvc_md5(source)}))
    stored = shards if params.train.source != "stream" else []
    dtype = params.extract.store_dtype
    if not extraction.extract(model, texts, stored, names, resume, dtype, params.hardware):
        return {}
    rows = [shard.rows for shard in stored]
    sizes = []
    for hookpoint in names:
        source, target = resume / hookpoint, token_table.parent / hookpoint
        files = [target / store.shard_name(shard.number) for shard in stored]
        for file in files:
            move(source / file.name, file)
        store.write_index(target, rows, widths[hookpoint], dtype, local_name(params.model.name), hookpoint)
        sizes.append([hookpoint, widths[hookpoint], f"{sum(file.stat().st_size for file in files) / 1e6:,.1f}"])
    table = extraction.token_table(texts, shards)
    write_atomically(token_table, table.write_parquet)
    shutil.rmtree(resume, ignore_errors=True)
    numbers = {
        "tokens": len(table),
        "texts": len(texts),
        "padding_share": round(extraction.padding_share(texts, shards), 4),
        "hookpoints": len(params.hookpoints),
        "layers": len(hookpoints.blocks(model)),
    }
    log.info("%s: %s tokens of %s texts, %.1f %% padding", name,
             f"{len(table):,}", f"{len(texts):,}", 100 * numbers["padding_share"])  # fmt: skip
    stage.table(["hookpoint", "width", "MB stored"], sizes)
    return numbers | {f"d/{hookpoint}": widths[hookpoint] for hookpoint in params.hookpoints}
