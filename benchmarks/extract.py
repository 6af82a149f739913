"""`python benchmarks/extract.py`: the extraction of `extract` against bare forward passes to the same depth.

`babelscope.activations.extraction.extract` runs as the stage calls it, shards written, on every n-th of the default's
batches (`dvc repro sample` makes the texts). The bare model runs on about as many tokens without hooks, masks, padding
or files: batches of `extract.batch_tokens` tokens in rows of one length, without the blocks above the last hookpoint.
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
from babelscope.models import hardware, hookpoints, loading
from babelscope.models.tokens import TokenizedTexts, tokenize_corpus

TOKENS, ROUNDS = 20_000, 7
OURS, BARE = "babelscope", "bare forward pass"


def sample(params: config.Config) -> tuple[TokenizedTexts, list[extraction.Shard]]:
    """One shard of every n-th batch of the whole corpus, so that it has all lengths and the usual padding."""
    corpus, tokenizer = pl.read_parquet("data/corpus/texts.parquet"), loading.load_tokenizer(params.model)
    texts = tokenize_corpus(tokenizer, corpus, params.corpus.max_tokens)
    step = max(1, int(texts.lengths.sum()) // TOKENS)
    chosen = texts.batches(params.extract.batch_tokens)[step // 2 :: step]
    return texts, [extraction.Shard(0, chosen, sum(int(texts.lengths[batch].sum()) for batch in chosen))]


def packed(texts: TokenizedTexts, shards: list[extraction.Shard], batch_tokens: int) -> list[Tensor]:
    """The same token ids end to end, as full batches [rows, length] with the mean length of the texts (rounded)."""
    rows_of_ids = [text.ids for shard in shards for batch in shard.batches for text in texts[batch]]
    ids = torch.tensor([token for row in rows_of_ids for token in row])
    length = round(len(ids) / len(rows_of_ids))
    rows = batch_tokens // length
    return list(ids[: len(ids) // (rows * length) * rows * length].view(-1, rows, length))


def cut(model: Any, layers: int) -> torch.nn.Module:
    """The body of the model (no head) with its first `layers` blocks."""
    bare = copy.deepcopy(model)
    del hookpoints.blocks(bare)[layers:]
    body: torch.nn.Module = bare.base_model
    return body


def extraction_seconds(
    model: Any, texts: TokenizedTexts, shards: list[extraction.Shard], params: config.Config
) -> float:
    """Seconds that the stage's call takes."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        dtype = params.extract.store_dtype
        extraction.extract(model, texts, shards, params.hookpoints, Path(folder), dtype, params.hardware)
        return time.perf_counter() - start


@torch.inference_mode()
def bare_seconds(body: torch.nn.Module, full: list[Tensor]) -> float:
    """Seconds for all batches."""
    start = time.perf_counter()
    for ids in full:
        last = body(input_ids=ids, use_cache=False).last_hidden_state
    last[0, 0, 0].item()  # a GPU works asynchronously
    return time.perf_counter() - start


def main() -> None:
    params = config.load()
    device = hardware.prepare(params.hardware)
    texts, shards = sample(params)
    full = [ids.to(device) for ids in packed(texts, shards, params.extract.batch_tokens)]
    model = loading.load_model(params.model, params.extract.dtype)
    body = cut(model, 1 + max(hookpoints.layer_of(name) for name in params.hookpoints)).to(device)
    count = {OURS: sum(shard.rows for shard in shards), BARE: sum(ids.numel() for ids in full)}
    rates: dict[str, list[float]] = {name: [] for name in count}
    for number in range(1 + ROUNDS):  # the first does not count
        seconds = {OURS: extraction_seconds(model, texts, shards, params), BARE: bare_seconds(body, full)}
        for name in rates if number else ():
            rates[name].append(count[name] / seconds[name])
    ratio = statistics.median(a / b for a, b in zip(rates[OURS], rates[BARE], strict=True))
    case = f"{params.model.name} {params.extract.dtype}, {len(params.hookpoints)} hookpoints, {count[OURS]} tokens"
    print(f"{case}, {race.machine()}")
    for name, values in rates.items():
        print(f"{name:20}{statistics.median(values):9.0f} tokens/s")
    print(f"median of the rounds' ratios: {ratio:.3f}, padding {extraction.padding_share(texts, shards):.1%}")
    race.write("extract", [
        race.record(case, name, round(statistics.median(values)), "tokens/s",
                    **({"ratio_to_floor": ratio} if name == OURS else {}))
        for name, values in rates.items()
    ])  # fmt: skip


if __name__ == "__main__":
    main()
