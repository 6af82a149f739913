"""Trains all SAEs during one forward pass, for corpora whose activations do not fit on a disk.

`train` and `encode` copy its files, so that every output has the same path as with stored activations.
"""

import os
from typing import Any

import polars as pl
import torch

from babelscope import sae
from babelscope.activations.streaming import Stream
from babelscope.config import Config
from babelscope.config.values import local_name
from babelscope.core import stage
from babelscope.core.errors import UserError
from babelscope.core.files import read_table, write_atomically, write_json
from babelscope.core.paths import Paths
from babelscope.core.progress import Progress
from babelscope.core.resume import kept
from babelscope.features.count import count
from babelscope.models import hardware, hookpoints, loading, tokens
from babelscope.sae import checkpoint
from babelscope.sae.training.loop import train


def stream(params: Config, paths: Paths) -> None:
    """Write `paths.stream / <hookpoint>`: the SAE, its history, counts, totals and quality."""
    device = hardware.prepare(params.hardware)
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    loading.check_hookpoints(params.model, params.hookpoints)
    corpus = read_table(paths.texts)
    tokenizer = loading.load_tokenizer(params.model)

    training = tokens.tokenize_corpus(tokenizer, corpus.filter(split="train"), params.corpus.max_tokens)
    if not len(training) or corpus.filter(split="eval").is_empty():
        raise UserError(f"{paths.texts}: no texts of split 'train' or none of split 'eval'")
    model = loading.load_model(params.model, params.extract.dtype).to(device)
    hookpoints.resolve(model, params.hookpoints)
    tokens.check_fits(model, training)
    tokens.check_fits(model, tokens.tokenize_corpus(tokenizer, corpus.filter(split="eval"), params.corpus.max_tokens))
    dtype, steps = loading.DTYPES[params.extract.store_dtype], -(-params.train.tokens // params.train.batch)
    source = Stream(
        model, training, params.hookpoints,
        transcode=params.train.transcode, dtype=dtype, batch_tokens=params.extract.batch_tokens,
        size=params.train.batch, steps=steps, seed=params.seed,
    )  # fmt: skip
    depends = params.model_dump(include={"extract", "hookpoints", "languages", "model", "seed", "train"})
    with kept("stream", depends | {"max_tokens": params.corpus.max_tokens}, [paths.texts]) as folder:
        trained = train(source, params.train, params.hardware, seed=params.seed, folder=folder, label="stream")
        if trained is None:
            return
        for name, (dictionary, history) in zip(params.hookpoints, trained, strict=True):
            metadata = {"model_name": local_name(params.model.name), "hook_name": name}
            checkpoint.save(dictionary, paths.stream / name, metadata)
            write_atomically(paths.stream / name / "history.csv", pl.DataFrame(history).write_csv)
        del source, training, trained, dictionary
        count_firings(params, paths, model, tokens.tokenize_corpus(tokenizer, corpus, params.corpus.max_tokens))


def count_firings(params: Config, paths: Paths, model: Any, texts: tokens.TokenizedTexts) -> None:
    """Write counts, totals and quality of every SAE as loaded from its file; log a line for each."""
    saes = {name: sae.load(paths.stream, name).to(hookpoints.device_of(model)) for name in params.hookpoints}
    with Progress("count", int(texts.lengths.sum()), "tokens") as progress:
        measured = count(
            model, texts, saes, params.languages, dtype=loading.DTYPES[params.extract.store_dtype],
            batch_tokens=params.extract.batch_tokens, chunk_tokens=params.encode.chunk_tokens, advance=progress.update,
        )  # fmt: skip
    rows = []
    for name, found in measured.items():
        figures = found.quality.figures(params.languages)
        write_atomically(paths.stream / name / "counts.parquet", found.counts.write_parquet)
        write_atomically(paths.stream / name / "totals.parquet", found.totals.write_parquet)
        write_json(paths.stream / name / "quality.json", figures)
        shown = f"{figures['fvu']:.3f}", f"{figures['l0']:.1f}", f"{100 * figures['dead_share']:.1f} %"
        rows.append([name, *shown, found.counts["unit"].n_unique()])
    stage.table(["hookpoint", "FVU", "L0", "dead latents", "fired"], rows)
