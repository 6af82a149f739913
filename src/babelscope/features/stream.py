"""Trains all SAEs during one forward pass, for corpora whose activations do not fit on a disk.

`train` and `encode` copy its files, so that every output has the same path as with stored activations.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import polars as pl

from babelscope import sae
from babelscope.activations.streaming import Stream
from babelscope.config import Config
from babelscope.config.values import local_name
from babelscope.core import stage
from babelscope.core.errors import UserError
from babelscope.core.files import read_json, read_table, write_atomically, write_json
from babelscope.core.paths import Paths
from babelscope.core.progress import Progress
from babelscope.core.resume import kept
from babelscope.features.count import count
from babelscope.models import hardware, hookpoints, loading, tokens
from babelscope.models.processes import rank, together
from babelscope.sae import checkpoint
from babelscope.sae.training.loop import train


def stream(params: Config, paths: Paths) -> None:
    """Write `paths.stream / <hookpoint>`: the SAE, its history, counts, totals and quality."""
    device = hardware.prepare_own(params.hardware)
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
        processes=hardware.divides(params.hardware, len(params.hookpoints)),
    )  # fmt: skip
    depends = params.model_dump(include={"extract", "hookpoints", "languages", "model", "seed", "train"})
    with kept("stream", depends | {"max_tokens": params.corpus.max_tokens}, [paths.texts]) as folder:
        trained = train(source, params.train, params.hardware, seed=params.seed, folder=folder, label="stream")
        if trained is None:
            return
        shares = source.shares
        for name, (dictionary, history) in zip(source.hookpoints, trained, strict=True):
            metadata = {"model_name": local_name(params.model.name), "hook_name": name}
            checkpoint.save(dictionary, paths.stream / name, metadata)
            write_atomically(paths.stream / name / "history.csv", pl.DataFrame(history).write_csv)
        del source, training, trained, dictionary
        texts = tokens.tokenize_corpus(tokenizer, corpus, params.corpus.max_tokens)
        count_firings(params, paths, model, texts, shares)


def count_firings(
    params: Config, paths: Paths, model: Any, texts: tokens.TokenizedTexts, shares: Sequence[Sequence[str]]
) -> None:
    """Write counts, totals and quality of every SAE as loaded from its file; log a line for each.

    `shares`: the hookpoints of each process (see `count`).
    """
    own, device = rank() if len(shares) > 1 else 0, hookpoints.device_of(model)
    saes = {name: sae.load(paths.stream, name).to(device) for name in shares[own]}
    with Progress("count", int(texts.lengths.sum()), "tokens") as progress:
        measured = count(
            model, texts, saes, params.languages, dtype=loading.DTYPES[params.extract.store_dtype],
            batch_tokens=params.extract.batch_tokens, chunk_tokens=params.encode.chunk_tokens, shares=shares,
            advance=progress.update if own == 0 else lambda tokens: None,
        )  # fmt: skip

    def write() -> None:
        for name, found in measured.items():
            write_atomically(paths.stream / name / "counts.parquet", found.counts.write_parquet)
            write_atomically(paths.stream / name / "totals.parquet", found.totals.write_parquet)
            write_json(paths.stream / name / "quality.json", found.quality.figures(params.languages))

    if len(shares) > 1:
        together(write, device)  # the first process, which ends the stage, must not end before the others
    else:
        write()  # the other processes, if there are any, have ended
    if own == 0:
        stage.table(["hookpoint", "FVU", "L0", "dead latents", "fired"], map(partial(_row, paths), params.hookpoints))


def _row(paths: Paths, name: str) -> list[object]:
    figures, counts = (
        read_json(paths.stream / name / "quality.json"),
        read_table(paths.stream / name / "counts.parquet"),
    )
    shown = f"{figures['fvu']:.3f}", f"{figures['l0']:.1f}", f"{100 * figures['dead_share']:.1f} %"
    return [name, *shown, counts["unit"].n_unique()]
