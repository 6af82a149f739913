"""`python benchmarks/encode.py`: the stage `encode` against an encoder product and a top-k alone.

The whole stage (loading, reading and counting included) runs on some of the default's training texts, with the
default's dictionary (`dvc repro` makes both) and with a wider one of random weights. Its floors are one product and one
`torch.topk` on the same chunks in memory: by `torch.nn.functional.linear` in float32 and in bfloat16, and by
`babelscope.models.matmul`, the fastest exact product here. The goal is 1.3 times the time of the first floor.
"""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import race
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from babelscope import config, sae
from babelscope.activations.store import ActivationStore
from babelscope.core.paths import Paths
from babelscope.features import run_encode
from babelscope.models import matmul
from babelscope.sae.autoencoder import SAE, chunk_rows, initialise
from babelscope.sae.checkpoint import save

HOOKPOINT, WIDE = "layers.14.post_feedforward_layernorm", 32768
# Tokens (about) that are encoded in a round.
TOKENS, ROUNDS = 36_000, 7
OURS = "babelscope"
FLOORS: dict[str, tuple[Callable[..., Tensor], torch.dtype]] = {
    "floor float32": (F.linear, torch.float32),
    "floor bfloat16": (F.linear, torch.bfloat16),
    "floor babelscope.models.matmul": (matmul.linear, torch.float32),
}


def sample() -> pl.DataFrame:
    """The token table of every n-th training text (texts are in the order of their lengths)."""
    table = pl.read_parquet("data/activations/tokens.parquet").filter(split="train")
    step = max(1, len(table) // TOKENS)
    return table.filter(pl.col("text_id").rle_id() % step == 0)


def lay_out(folder: Path, table: pl.DataFrame, dictionary: SAE) -> None:
    """Write the stage's inputs."""
    save(dictionary, folder / "data/sae" / HOOKPOINT, {"model_name": "", "hook_name": HOOKPOINT})
    activations = folder / "data/activations"
    activations.mkdir()
    (activations / HOOKPOINT).symlink_to(Path("data/activations", HOOKPOINT).absolute())
    table.write_parquet(activations / "tokens.parquet")


def floor(
    dictionary: SAE, chunks: list[Tensor], product: Callable[..., Tensor], dtype: torch.dtype
) -> Callable[[], None]:
    """The scores of all latents and the k best, over as many rows at once as `SAE.encode` takes."""
    k, size = dictionary.k or 0, chunk_rows(dictionary.latents, torch.device("cpu"))
    weight, bias = dictionary.encoder.detach().to(dtype), dictionary.b_enc.detach().to(dtype)
    centred = [dictionary.centre(chunk).detach().to(dtype) for chunk in chunks]

    @torch.inference_mode()
    def run() -> None:
        for chunk in centred:
            for rows in chunk.split(size):
                product(rows, weight, bias).topk(k, sorted=False)

    return run


def seconds(dictionary: SAE, params: config.Config, table: pl.DataFrame) -> dict[str, float]:
    """Median seconds of the stage and its floors."""
    rows = ActivationStore(Path("data/activations") / HOOKPOINT).gather(table["row"].to_torch())
    chunks = list(rows.split(params.encode.chunk_tokens))
    runners: dict[str, Callable[[], object]] = {
        name: floor(dictionary, chunks, product, dtype) for name, (product, dtype) in FLOORS.items()
    }
    stage, root = run_encode.encode, Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        lay_out(Path(folder), table, dictionary)
        os.chdir(folder)
        try:
            return race.race({OURS: lambda: stage(HOOKPOINT, params, Paths()), **runners}, ROUNDS, warmup=1)
        finally:
            os.chdir(root)


def report(case: str, rates: dict[str, float]) -> list[dict[str, Any]]:
    """Print a case's table and return its records."""
    print(f"\n{case}\n{'':26}{'tokens/s':>10}{'babelscope takes':>18}")
    for name, rate in rates.items():
        print(f"{name:26}{rate:10.0f}{rate / rates[OURS]:16.2f} x", flush=True)
    names = ("ratio_to_floor", "ratio_to_floor_bfloat16", "ratio_to_floor_matmul")
    ratios = {key: rates[OURS] / rates[name] for key, name in zip(names, FLOORS, strict=True)}
    return [
        race.record(case, name, round(rate), "tokens/s", **(ratios if name == OURS else {}))
        for name, rate in rates.items()
    ]


def main() -> None:
    params, table = config.load(), sample()
    trained = sae.load(Path("data/sae"), HOOKPOINT)
    mean, k, scale = trained.b_dec.detach(), params.train.k, params.train.encoder_scale
    records = []
    print(race.machine())
    for dictionary in (trained, initialise(mean, WIDE, k, encoder_scale=scale, seed=0)):
        times = seconds(dictionary, params, table)
        case = f"{HOOKPOINT}, {dictionary.d_in} x {dictionary.latents}, k {k}, {len(table)} tokens"
        records += report(case, {name: len(table) / time for name, time in times.items()})
    race.write("encode", records)


if __name__ == "__main__":
    main()
