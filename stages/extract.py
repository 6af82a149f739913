"""Stage `extract`: activations at every hookpoint, from one forward pass over the sampled texts."""

import logging
import shutil
from pathlib import Path

import polars as pl

from babelscope import config, stage
from babelscope.files import scratch, write_atomically, write_json
from babelscope.fingerprint import dvc_md5, fingerprint

CORPUS, OUT, METRICS = Path("data/corpus/texts.parquet"), Path("data/activations"), Path("metrics/extract.json")
log = logging.getLogger(__name__)


def main() -> None:
    params = config.load()
    from babelscope import hardware
    from babelscope.activations import extraction, store
    from babelscope.models import hookpoints, loading, tokens

    hardware.prepare(params.hardware)
    skeleton = loading.load_skeleton(params.model)
    if skeleton is not None:
        hookpoints.resolve(skeleton, params.hookpoints)
    corpus = pl.read_parquet(CORPUS)
    tokenizer = loading.load_tokenizer(params.model)
    texts = tokens.tokenize(tokenizer, corpus["text_id"].to_list(), corpus["text"].to_list(), params.corpus.max_tokens)
    shards = extraction.plan(tokens.by_length(texts), params.extract.batch_tokens)
    table = extraction.token_table(shards, corpus)
    model = loading.load_model(params.model, params.extract.dtype)
    hookpoints.resolve(model, params.hookpoints)

    knobs = params.model_dump(include={"hookpoints", "model", "extract"}) | {"max_tokens": params.corpus.max_tokens}
    resume = scratch(fingerprint("extract", knobs, {str(CORPUS): dvc_md5(CORPUS)}))
    is_first = extraction.extract(model, shards, params.hookpoints, resume, params.extract.store_dtype, params.hardware)
    if not is_first:
        return
    widths: dict[str, int] = {}
    for name in params.hookpoints:
        (OUT / name).mkdir(parents=True, exist_ok=True)
        for shard in shards:
            (resume / name / store.shard_name(shard.number)).replace(OUT / name / store.shard_name(shard.number))
        rows = [shard.rows for shard in shards]
        widths[name] = store.width(OUT / name)
        store.write_index(
            OUT / name, rows, widths[name], params.extract.store_dtype, loading.name_of(params.model), name
        )
    write_atomically(OUT / "tokens.parquet", table.write_parquet)
    shutil.rmtree(resume)
    numbers = {
        "tokens": len(table),
        "texts": len(texts),
        "padding_share": round(extraction.padding_share(shards), 4),
        "hookpoints": len(params.hookpoints),
    }
    write_json(METRICS, numbers | {f"d/{name}": d for name, d in widths.items()})
    log.info("extract: %d tokens of %d texts at %d hookpoints, %.1f %% padding",
             len(table), len(texts), len(widths), 100 * numbers["padding_share"])  # fmt: skip


if __name__ == "__main__":
    stage.run(main)
