"""Stage `extract`: activations at every hookpoint, from one forward pass over the sampled texts.

If `train.source` is `stream`, no activations are kept: only the token table and empty stores with the widths are
written.
"""

import logging
import shutil

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
    hardware.prepare(params.hardware)
    loading.check_hookpoints(params.model, params.hookpoints)
    corpus = read_table(paths.texts)
    texts = tokens.tokenize_corpus(loading.load_tokenizer(params.model), corpus, params.corpus.max_tokens)
    shards = extraction.plan(texts, params.extract.batch_tokens)
    model = loading.load_model(params.model, params.extract.dtype)
    hookpoints.resolve(model, params.hookpoints)
    tokens.check_fits(model, texts)
    names = forward.names_to_read(params.hookpoints, params.train.transcode)
    widths = forward.widths(model, names)

    depends = params.model_dump(include={"hookpoints", "model", "extract"}) | {"max_tokens": params.corpus.max_tokens}
    depends["transcode"] = params.train.transcode
    resume = scratch(fingerprint("extract", depends, {str(paths.texts): dvc_md5(paths.texts)}))
    stored = shards if params.train.source != "stream" else []
    dtype = params.extract.store_dtype
    if not extraction.extract(model, texts, stored, names, resume, dtype, params.hardware):
        return
    rows = [shard.rows for shard in stored]
    sizes = []
    for name in names:
        source, target = store.place(resume, name), store.place(paths.activations, name)
        files = [target / store.shard_name(shard.number) for shard in stored]
        for file in files:
            move(source / file.name, file)
        store.write_index(target, rows, widths[name], dtype, local_name(params.model.name), name)
        sizes.append([name, widths[name], f"{sum(file.stat().st_size for file in files) / 1e6:,.1f}"])
    table = extraction.token_table(texts, shards)
    write_atomically(paths.tokens, table.write_parquet)
    shutil.rmtree(resume, ignore_errors=True)
    numbers = {
        "tokens": len(table),
        "texts": len(texts),
        "padding_share": round(extraction.padding_share(texts, shards), 4),
        "hookpoints": len(params.hookpoints),
        "layers": len(hookpoints.blocks(model)),
    }
    write_json(paths.metrics("extract"), numbers | {f"d/{name}": widths[name] for name in params.hookpoints})
    log.info("extract: %s tokens of %s texts, %.1f %% padding",
             f"{len(table):,}", f"{len(texts):,}", 100 * numbers["padding_share"])  # fmt: skip
    stage.table(["hookpoint", "width", "MB stored"], sizes)
