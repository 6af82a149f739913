"""`python benchmarks/encode.py`: the stage `encode` against itself without screening, and against its floors.

The whole stage (loading, reading and counting included) runs on some of the default's training texts, with the
default's dictionary (`dvc repro` makes both) and with a wider one of random weights, and on random activations of 2,048
dimensions. `without screening` is the same stage with one float32 product and a top-k for every dictionary
(`babelscope.sae.screening` says which dictionaries are screened); the goal for the widest is 1.5 times its tokens/s,
and the share of rows that need a second comparison is printed. The floors are one product and one
`torch.topk` on the same chunks in memory: by `torch.nn.functional.linear` in float32 and in bfloat16, and by
`babelscope.models.matmul`, the fastest exact product here.
"""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import polars as pl
import race
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from babelscope import config, sae
from babelscope.activations import store
from babelscope.activations.store import ActivationStore
from babelscope.core.paths import Paths
from babelscope.features import run_encode
from babelscope.models import matmul
from babelscope.sae.autoencoder import SAE, chunk_rows, initialise
from babelscope.sae.checkpoint import save
from babelscope.sae.screening import ExactTopK, screening_dtype

HOOKPOINT = "layers.14.post_feedforward_layernorm"
# Latents, active latents and, for random activations, dimensions of the wide dictionaries.
LATENTS, K, D = 32768, 32, 2048
# Tokens (about) that are encoded in a round, by the default's and by a wide dictionary.
TOKENS, FEW, ROUNDS = 36_000, 8_192, 5
RATIOS = ("ratio_without_screening", "ratio_to_floor", "ratio_to_floor_bfloat16", "ratio_to_floor_matmul")
OURS, BEFORE = "babelscope", "without screening"
FLOORS: dict[str, tuple[Callable[..., Tensor], torch.dtype]] = {
    "floor float32": (F.linear, torch.float32),
    "floor bfloat16": (F.linear, torch.bfloat16),
    "floor babelscope.models.matmul": (matmul.linear, torch.float32),
}


def sample(count: int) -> pl.DataFrame:
    """The token table of every n-th training text (texts are in the order of their lengths)."""
    table = pl.read_parquet("data/activations/tokens.parquet").filter(split="train")
    step = max(1, len(table) // count)
    return table.filter(pl.col("text_id").rle_id() % step == 0)


def random_store(folder: Path, rows: int) -> Path:
    """A store of random activations whose dimensions have very different variances, as those of models have."""
    spread = torch.logspace(1, -1, D)
    store.write_shard(folder, 0, (torch.randn(rows, D) * spread).half())
    store.write_index(folder, [rows], D, "float16", "random", HOOKPOINT)
    return folder


def lay_out(folder: Path, table: pl.DataFrame, dictionary: SAE, activations: Path) -> None:
    """Write the stage's inputs."""
    save(dictionary, folder / "data/sae" / HOOKPOINT, {"model_name": "", "hook_name": HOOKPOINT})
    place = folder / "data/activations"
    place.mkdir()
    (place / HOOKPOINT).symlink_to(activations.absolute())
    table.write_parquet(place / "tokens.parquet")


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


def seconds(dictionary: SAE, params: config.Config, table: pl.DataFrame, activations: Path) -> dict[str, float]:
    """Median seconds of the stage and, for a small dictionary, its floors."""
    rows = ActivationStore(activations).gather(table["row"].to_torch())
    chunks = list(rows.split(params.encode.chunk_tokens))
    runners: dict[str, Callable[[], object]] = {
        name: floor(dictionary, chunks, product, dtype)
        for name, (product, dtype) in ({} if dictionary.is_screened else FLOORS).items()
    }
    root = Path.cwd()

    def stage() -> None:
        run_encode.run(params, Paths(), HOOKPOINT)

    def without_screening() -> None:
        with patch("babelscope.sae.autoencoder.suits", lambda *_: False):
            stage()

    with tempfile.TemporaryDirectory() as folder:
        lay_out(Path(folder), table, dictionary, activations)
        os.chdir(folder)
        try:
            return race.race({OURS: stage, BEFORE: without_screening, **runners}, ROUNDS, warmup=1)
        finally:
            os.chdir(root)


@torch.no_grad()
def redone(dictionary: SAE, rows: Tensor) -> float:
    """The share of rows that are compared a second time."""
    choose = ExactTopK(dictionary.encoder, dictionary.b_enc, dictionary.k or 0, screening_dtype(rows.device))
    for chunk in rows.split(chunk_rows(dictionary.latents, rows.device)):
        choose(dictionary.centre(chunk))
    return choose.redone / len(rows)


def report(case: str, rates: dict[str, float]) -> list[dict[str, Any]]:
    """Print a case's table and return its records."""
    print(f"\n{case}\n{'':26}{'tokens/s':>10}{'babelscope takes':>18}")
    for name, rate in rates.items():
        print(f"{name:26}{rate:10.0f}{rate / rates[OURS]:16.2f} x", flush=True)
    ratios = {
        key: rates[OURS] / rates[name] for key, name in zip(RATIOS, (BEFORE, *FLOORS), strict=True) if name in rates
    }
    return [
        race.record(case, name, round(rate), "tokens/s", **(ratios if name == OURS else {}))
        for name, rate in rates.items()
    ]


def main() -> None:
    params = config.load()
    trained, stored = sae.load(Path("data/sae"), HOOKPOINT), Path("data/activations") / HOOKPOINT
    mean, scale = trained.b_dec.detach(), params.train.encoder_scale
    records = []
    print(race.machine())
    with tempfile.TemporaryDirectory() as folder:
        made = random_store(Path(folder), FEW)
        few = sample(FEW).head(FEW)
        numbered = few.with_columns(row=pl.int_range(pl.len(), dtype=few.schema["row"]))
        for dictionary, activations, table in (
            (trained, stored, sample(TOKENS)),
            (initialise(mean, LATENTS, K, encoder_scale=scale, seed=0), stored, few),
            (initialise(torch.zeros(D), LATENTS, K, encoder_scale=scale, seed=0), made, numbered),
        ):
            times = seconds(dictionary, params, table, activations)
            case = f"{dictionary.d_in} x {dictionary.latents}, k {dictionary.k}, {len(table)} tokens"
            records += report(case, {name: len(table) / time for name, time in times.items()})
            if dictionary.is_screened:
                share = redone(dictionary, ActivationStore(activations).gather(table["row"].to_torch()))
                print(f"{100 * share:.2f} % of the rows compared a second time")
                records.append(race.record(case, "rows compared a second time", round(share, 5), "share"))
    race.write("encode", records)


if __name__ == "__main__":
    main()
