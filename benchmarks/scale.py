"""`python benchmarks/scale.py`: the rates behind `docs/scaling.md`, measured on one device at full size.

For models of the shapes of Llama 3.2 1B and Llama 3.1 8B with random weights, in bfloat16: a pass of `extract` over
texts of 128 tokens without writing (`activations.streaming`), and a short one with writing, which gives the speed of
writing; the training step of an SAE of 131,072 latents; its encoding with the counting of `encode`. `--small` does the
same at a small size and writes nothing.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import race
import torch
from peers.worker import DEVICE, Case, batches, timed
from sae_step import ours

from babelscope.activations import extraction
from babelscope.activations.streaming import Stream
from babelscope.config.schema import Hardware
from babelscope.features.counter import Counter
from babelscope.models.tokens import TokenizedTexts
from babelscope.sae.autoencoder import initialise

LENGTH, LANGUAGES = 128, 15
HARDWARE = Hardware(
    accelerator="auto", devices=1, num_nodes=1, strategy="auto", threads=0, checkpoint_seconds=0, parallel=1
)
# Shapes: width, width of the MLP, blocks, heads, heads of keys; rows of a training batch, latents.
MODELS = {
    "Llama 3.2 1B": (2048, 8192, 16, 32, 8, 8192, 131072),
    "Llama 3.1 8B": (4096, 14336, 32, 32, 8, 8192, 131072),
}
SMALL = {"toy": (64, 128, 2, 4, 2, 256, 1024)}


def model_of(shape: tuple[int, ...], vocabulary: int) -> Any:
    """A Llama with random weights in bfloat16 on the device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    d, inner, blocks, heads, key_heads, *_ = shape
    config = LlamaConfig(
        hidden_size=d, intermediate_size=inner, num_hidden_layers=blocks, num_attention_heads=heads,
        num_key_value_heads=key_heads, vocab_size=vocabulary, tie_word_embeddings=True,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(DEVICE):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


def texts_of(tokens: int, vocabulary: int) -> TokenizedTexts:
    """Texts of `LENGTH` random tokens."""
    ids = torch.randint(vocabulary, (tokens // LENGTH, LENGTH), generator=torch.Generator().manual_seed(0))
    text_ids = [f"{number:06d}" for number in range(len(ids))]
    frame = pl.DataFrame(
        {"text_id": text_ids, "token_ids": ids.tolist()}, schema_overrides={"token_ids": pl.List(pl.Int32)}
    )
    return TokenizedTexts(frame)


def seconds(work: Callable[[], object], rounds: int) -> float:
    """Median seconds of `work`, after one run that does not count."""
    times = []
    for _ in range(1 + rounds):
        start = time.perf_counter()
        work()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def passes(shape: tuple[int, ...], vocabulary: int, tokens: int, batch_tokens: int) -> dict[str, float]:
    """Tokens/s of forward passes read at every MLP output: into a buffer, and by `extract` into files."""
    model = model_of(shape, vocabulary)
    names = [f"layers.{block}.mlp" for block in range(shape[2])]
    texts = texts_of(tokens, vocabulary)
    options: dict[str, Any] = {"transcode": False, "dtype": torch.float16, "batch_tokens": batch_tokens}
    stream = Stream(model, texts, names, **options, size=1024, steps=1, seed=0, block_rows=tokens)
    every = torch.arange(len(texts))
    rates = {"forward pass, all hookpoints read": tokens / seconds(lambda: stream._compute(every), 3)}
    few = TokenizedTexts(texts.frame[: len(texts) // 4])
    shards = extraction.plan(few, batch_tokens)

    def write() -> None:
        with tempfile.TemporaryDirectory() as folder:
            extraction.extract(model, few, shards, names, Path(folder), "float16", HARDWARE)

    rates["extract to float16 files, start-up included"] = LENGTH * len(few) / seconds(write, 1)
    return rates


def training(case: Case, steps: int) -> dict[str, float]:
    """Tokens/s of the training step."""
    turn = timed(ours(case), case)
    turn(steps)
    return {"SAE training step": case.batch / statistics.median(turn(steps) for _ in range(3))}


@torch.no_grad()
def encoding(case: Case) -> dict[str, float]:
    """Tokens/s of encoding, and with the counting, as stage `encode` does them."""
    sae = initialise(torch.zeros(case.d), case.latents, case.k, encoder_scale=0.5, seed=0).to(DEVICE)
    x = batches(case)[0].half().to(DEVICE)
    counter = Counter([str(number) for number in range(LANGUAGES)], case.latents)
    text = torch.arange(len(x)) // LENGTH
    language = text % LANGUAGES

    def count() -> None:
        values, indices = sae.encode(x)
        counter.add(values.cpu(), indices.cpu(), language, text)

    return {
        "SAE encode": len(x) / seconds(lambda: sae.encode(x), 5),
        "SAE encode and count": len(x) / seconds(count, 5),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the rates that docs/scaling.md calculates with.")
    parser.add_argument("--small", action="store_true", help="a toy's size, nothing written")
    small = parser.parse_args().small
    print(race.machine(), flush=True)
    records = []
    for name, shape in (SMALL if small else MODELS).items():
        case = Case(shape[0], shape[6], shape[5])
        vocabulary, tokens, batch_tokens = (512, 2048, 512) if small else (128256, 65536, 16384)
        for work in (
            lambda: passes(shape, vocabulary, tokens, batch_tokens),  # noqa: B023
            lambda: training(case, 3 if small else 10),  # noqa: B023
            lambda: encoding(case),  # noqa: B023
        ):
            for what, rate in work().items():
                print(f"{name:14} {what:36}{rate:12.0f} tokens/s", flush=True)
                records.append(race.record(f"{name}, {case}", what, round(rate), "tokens/s"))
            if DEVICE.type == "cuda":
                torch.cuda.empty_cache()
        if not small:
            race.write("scale" if DEVICE.type == "cpu" else "scale.cuda", records)


if __name__ == "__main__":
    main()
