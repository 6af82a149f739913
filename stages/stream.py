"""Stage `stream`: all SAEs at once from a running forward pass, where `train.source` is `stream`; else nothing.

`train` and `encode` publish what it leaves, so that every output is where stored activations would have put it.
"""

import logging
import os
import shutil
from pathlib import Path

from babelscope import config
from babelscope.activations.streamed import MODE, OUT
from babelscope.config.values import local_name
from babelscope.core import stage
from babelscope.core.errors import UserError
from babelscope.core.files import read_table, write_atomically, write_json
from babelscope.core.fingerprint import dvc_md5, fingerprint
from babelscope.core.resume import scratch

CORPUS = Path("data/corpus/texts.parquet")
log = logging.getLogger(__name__)


def main() -> None:
    params = config.load()
    config.check_folders(params)
    shutil.rmtree(OUT, ignore_errors=True)
    if params.train.source == "stream":
        stream(params)
    else:
        write_json(MODE, {"source": params.train.source})
        log.info("stream: nothing to do (params.yaml: train.source is %r)", params.train.source)


def stream(params: config.Config) -> None:
    # PyTorch, too, keeps what oneDNN prepares for a bfloat16 product of some shape (see `models.matmul`): 1024
    # times 0.4 MiB. Batches of texts have ever new shapes: a running pass would fill it, for nothing.
    os.environ.setdefault("LRU_CACHE_CAPACITY", "64")
    import polars as pl
    import torch

    from babelscope import sae
    from babelscope.activations.streaming import Stream
    from babelscope.core.progress import Progress
    from babelscope.features.count import count
    from babelscope.models import hardware, hookpoints, loading, tokens
    from babelscope.sae import checkpoint
    from babelscope.sae.training import module

    device = hardware.prepare(params.hardware)
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    loading.check_hookpoints(params.model, params.hookpoints)
    corpus = read_table(CORPUS)
    tokenizer = loading.load_tokenizer(params.model)

    training = tokens.tokenize_corpus(tokenizer, corpus.filter(split="train"), params.corpus.max_tokens)
    if not len(training) or corpus.filter(split="eval").is_empty():
        raise UserError(f"{CORPUS}: no texts of split 'train' or none of split 'eval'")
    model = loading.load_model(params.model, params.extract.dtype).to(device)
    hookpoints.resolve(model, params.hookpoints)
    tokens.check_fits(model, training)
    tokens.check_fits(model, tokens.tokenize_corpus(tokenizer, corpus.filter(split="eval"), params.corpus.max_tokens))
    dtype, steps = loading.DTYPES[params.extract.store_dtype], -(-params.train.tokens // params.train.batch)
    batches = Stream(
        model, training, params.hookpoints,
        transcode=params.train.transcode, dtype=dtype, batch_tokens=params.extract.batch_tokens,
        size=params.train.batch, steps=steps, seed=params.seed,
    )  # fmt: skip
    knobs = params.model_dump(include={"extract", "hookpoints", "languages", "model", "seed", "train"})
    work = fingerprint("stream", knobs | {"max_tokens": params.corpus.max_tokens}, {str(CORPUS): dvc_md5(CORPUS)})
    silent: list[module.Write] = [lambda step, metrics: None for _ in params.hookpoints]
    trained = module.train(
        batches, params.train, params.hardware, seed=params.seed, write=silent, checkpoint=scratch(work) / "state.pt"
    )
    if trained is None:
        return
    for name, (dictionary, history) in zip(params.hookpoints, trained, strict=True):
        checkpoint.save(dictionary, OUT / name, {"model_name": local_name(params.model.name), "hook_name": name})
        write_atomically(OUT / name / "history.csv", pl.DataFrame(history).write_csv)
    del batches, training, trained, dictionary
    # As `encode` reads them: what is counted is what the files say.
    saes = {name: sae.load(OUT, name).to(device) for name in params.hookpoints}

    texts = tokens.tokenize_corpus(tokenizer, corpus, params.corpus.max_tokens)
    with Progress("count", int(texts.lengths.sum()), "tokens") as progress:
        measured = count(
            model, texts, saes, params.languages, dtype=dtype, batch_tokens=params.extract.batch_tokens,
            chunk_tokens=params.encode.chunk_tokens, advance=progress.update,
        )  # fmt: skip
    rows = []
    for name, found in measured.items():
        figures = found.quality.figures(params.languages)
        write_atomically(OUT / name / "counts.parquet", found.counts.write_parquet)
        write_atomically(OUT / name / "totals.parquet", found.totals.write_parquet)
        write_json(OUT / name / "quality.json", figures)
        shown = f"{figures['fvu']:.3f}", f"{figures['l0']:.1f}", f"{100 * figures['dead_share']:.1f} %"
        rows.append([name, *shown, found.counts["unit"].n_unique()])
    write_json(MODE, {"source": params.train.source})
    shutil.rmtree(scratch(work), ignore_errors=True)
    stage.table(["hookpoint", "FVU", "L0", "dead latents", "fired"], rows)


if __name__ == "__main__":
    stage.run(main)
