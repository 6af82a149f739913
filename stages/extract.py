"""Stage `extract`: activations at every hookpoint, from one forward pass over the sampled texts.

Where `train.source` is `stream` no activations are kept: the token table and empty stores with the widths are written.
"""

import logging
import shutil
from pathlib import Path

from babelscope import config
from babelscope.config.values import local_name
from babelscope.core import stage
from babelscope.core.files import move, read_table, write_atomically, write_json
from babelscope.core.fingerprint import dvc_md5, fingerprint
from babelscope.core.resume import scratch

CORPUS, OUT, METRICS = Path("data/corpus/texts.parquet"), Path("data/activations"), Path("metrics/extract.json")
log = logging.getLogger(__name__)


def main() -> None:
    params = config.load()
    config.check_folders(params)
    from babelscope.activations import extraction, store
    from babelscope.models import forward, hardware, hookpoints, loading, tokens

    hardware.prepare(params.hardware)
    skeleton = loading.load_skeleton(params.model)
    if skeleton is not None:
        hookpoints.resolve(skeleton, params.hookpoints)
    corpus = read_table(CORPUS)
    tokenizer = loading.load_tokenizer(params.model)
    texts = tokens.tokenize(tokenizer, corpus["text_id"].to_list(), corpus["text"].to_list(), params.corpus.max_tokens)
    shards = extraction.plan(tokens.by_length(texts), params.extract.batch_tokens)
    table = extraction.token_table(shards, corpus)
    model = loading.load_model(params.model, params.extract.dtype)
    hookpoints.resolve(model, params.hookpoints)
    tokens.check_fits(model, texts)
    names = forward.names_to_read(params.hookpoints, params.train.transcode)
    widths = forward.widths(model, names)

    knobs = params.model_dump(include={"hookpoints", "model", "extract"}) | {"max_tokens": params.corpus.max_tokens}
    knobs["transcode"] = params.train.transcode
    resume = scratch(fingerprint("extract", knobs, {str(CORPUS): dvc_md5(CORPUS)}))
    stored = shards if params.train.source != "stream" else []
    is_first = extraction.extract(model, stored, names, resume, params.extract.store_dtype, params.hardware)
    if not is_first:
        return
    for name in names:
        source, target = store.place(resume, name), store.place(OUT, name)
        for shard in stored:
            move(source / store.shard_name(shard.number), target / store.shard_name(shard.number))
        rows = [shard.rows for shard in stored]
        store.write_index(
            target, rows, widths[name], params.extract.store_dtype, local_name(params.model.name), name
        )  # fmt: skip
    write_atomically(OUT / "tokens.parquet", table.write_parquet)
    shutil.rmtree(resume, ignore_errors=True)
    numbers = {
        "tokens": len(table),
        "texts": len(texts),
        "padding_share": round(extraction.padding_share(shards), 4),
        "hookpoints": len(params.hookpoints),
    }
    write_json(METRICS, numbers | {f"d/{name}": widths[name] for name in params.hookpoints})
    log.info("extract: %s tokens of %s texts, %.1f %% padding",
             f"{len(table):,}", f"{len(texts):,}", 100 * numbers["padding_share"])  # fmt: skip
    found = []
    for name in names:
        files = [store.place(OUT, name) / store.shard_name(shard.number) for shard in stored]
        found.append([name, widths[name], f"{sum(file.stat().st_size for file in files) / 1e6:,.1f}"])
    stage.table(["hookpoint", "width", "MB stored"], found)


if __name__ == "__main__":
    stage.run(main)
