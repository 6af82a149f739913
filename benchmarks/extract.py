"""`python benchmarks/extract.py`: the extraction of `extract` against bare forward passes to the same depth.

`babelscope.activations.extraction.extract` as the stage calls it, shards written, on every so manieth of the default's
batches (`dvc repro sample` makes the texts), and the same model on about as many tokens without hooks, masks, padding
or files: batches of `extract.batch_tokens` tokens in rows of one length, the blocks above the last hookpoint cut off.
The goal is 0.95 times the bare speed.
"""

import copy
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import polars as pl
import race
import torch
from torch import Tensor

from babelscope import config
from babelscope.activations import extraction
from babelscope.models import hardware, hookpoints, loading, tokens

TOKENS, ROUNDS = 20_000, 7
OURS, BARE = "babelscope", "bare forward pass"


def sample(params: config.Config) -> list[extraction.Shard]:
    """One shard of every so manieth batch of the whole corpus: of all lengths, and padded as all batches are."""
    corpus, tokenizer = pl.read_parquet("data/corpus/texts.parquet"), loading.load_tokenizer(params.model)
    texts = tokens.tokenize(tokenizer, corpus["text_id"].to_list(), corpus["text"].to_list(), params.corpus.max_tokens)
    shards = extraction.plan(tokens.by_length(texts), params.extract.batch_tokens)
    step = max(1, sum(shard.rows for shard in shards) // TOKENS)
    return [extraction.Shard(0, [batch for shard in shards for batch in shard.batches][step // 2 :: step])]


def packed(shards: list[extraction.Shard], batch_tokens: int) -> list[Tensor]:
    """The same token ids end to end, as full batches [rows, length] with the mean length of the texts (rounded)."""
    texts = [text.ids for shard in shards for batch in shard.batches for text in batch]
    ids = torch.tensor([token for text in texts for token in text])
    length = round(len(ids) / len(texts))
    rows = batch_tokens // length
    return list(ids[: len(ids) // (rows * length) * rows * length].view(-1, rows, length))


def cut(model: Any, layers: int) -> torch.nn.Module:
    """The body of the model (no head) with its first `layers` blocks."""
    bare = copy.deepcopy(model)
    del hookpoints.blocks(bare)[layers:]
    body: torch.nn.Module = bare.base_model
    return body


def extraction_seconds(model: Any, shards: list[extraction.Shard], params: config.Config) -> float:
    """Seconds that the stage's call takes."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        extraction.extract(model, shards, params.hookpoints, Path(folder), params.extract.store_dtype, params.hardware)
        return time.perf_counter() - start


@torch.inference_mode()
def bare_seconds(body: torch.nn.Module, full: list[Tensor]) -> float:
    """Seconds for all batches."""
    start = time.perf_counter()
    for ids in full:
        last = body(input_ids=ids, use_cache=False).last_hidden_state
    last[0, 0, 0].item()  # a GPU may still be at it
    return time.perf_counter() - start


def main() -> None:
    params = config.load()
    device = hardware.prepare(params.hardware)
    shards = sample(params)
    full = [ids.to(device) for ids in packed(shards, params.extract.batch_tokens)]
    model = loading.load_model(params.model, params.extract.dtype)
    body = cut(model, 1 + max(hookpoints.layer_of(name) for name in params.hookpoints)).to(device)
    count = {OURS: sum(shard.rows for shard in shards), BARE: sum(ids.numel() for ids in full)}
    rates: dict[str, list[float]] = {name: [] for name in count}
    for number in range(1 + ROUNDS):  # the first does not count
        seconds = {OURS: extraction_seconds(model, shards, params), BARE: bare_seconds(body, full)}
        for name in rates if number else ():
            rates[name].append(count[name] / seconds[name])
    ratio = statistics.median(a / b for a, b in zip(rates[OURS], rates[BARE], strict=True))
    case = f"{params.model.name} {params.extract.dtype}, {len(params.hookpoints)} hookpoints, {count[OURS]} tokens"
    print(f"{case}, {race.machine()}")
    for name, values in rates.items():
        print(f"{name:20}{statistics.median(values):9.0f} tokens/s")
    print(f"median of the rounds' ratios: {ratio:.3f}, padding {extraction.padding_share(shards):.1%}")
    race.write("extract", [
        race.record(case, name, round(statistics.median(values)), "tokens/s",
                    **({"ratio_to_floor": ratio} if name == OURS else {}))
        for name, values in rates.items()
    ])  # fmt: skip


if __name__ == "__main__":
    main()
