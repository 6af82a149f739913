"""`python benchmarks/store_dtypes.py`: what `extract.store_dtype` costs, on the activations that `make repro` has left.

The float16 activations of two of the default's hookpoints are stored once more in each dtype. Measured are the bytes on
disk, the relative error ||x' - x|| / ||x||, and the FVU of an SAE that is trained on them (by params.yaml), on the
held-out tokens in float16. A second seed on float16 shows how large such differences are by chance.

It reads the outputs of `make experiment NAME=smollm2-135m`; its figures in docs/ are of that model.
"""

import tempfile
from pathlib import Path

import polars as pl
import race
import torch

from babelscope import config
from babelscope.activations import store
from babelscope.activations.batches import Batches
from babelscope.models.loading import DTYPES
from babelscope.sae.metrics import quality
from babelscope.sae.training import loop

ACTIVATIONS, HOOKPOINTS = Path("data/activations"), ("layers.14.mlp", "layers.29.mlp")
CASES = [("float16", 0), ("float16", 1), ("bfloat16", 0), ("int8", 0)]
ROWS = 16384


def copy(source: store.ActivationStore, folder: Path, dtype: str) -> store.ActivationStore:
    """The same activations in another dtype."""
    sizes = []
    for number, first in enumerate(range(0, source.rows, ROWS)):
        x = source.gather(torch.arange(first, min(source.rows, first + ROWS)))
        x = x if dtype == "int8" else x.to(DTYPES[dtype])
        store.write_shard(folder, number, x, quantised=dtype == "int8")
        sizes.append(len(x))
    store.write_index(folder, sizes, source.d, dtype, source.index["model"], source.index["hookpoint"])
    return store.ActivationStore(folder)


def relative_error(found: store.ActivationStore, original: store.ActivationStore) -> float:
    """||x' - x|| / ||x|| over all rows."""
    wrong = whole = 0.0
    for first in range(0, original.rows, ROWS):
        rows = torch.arange(first, min(original.rows, first + ROWS))
        x = original.gather(rows).double()
        wrong += float((found.gather(rows).double() - x).square().sum())
        whole += float(x.square().sum())
    return (wrong / whole) ** 0.5


def fvu(found: store.ActivationStore, original: store.ActivationStore, params: config.Config, seed: int) -> float:
    """FVU of an SAE trained on `found`, on the held-out rows of `original`."""
    table = pl.read_parquet(ACTIVATIONS / "tokens.parquet")
    train, held_out = (table.filter(split=split)["row"].to_torch() for split in ("train", "eval"))
    steps = -(-params.train.tokens // params.train.batch)
    batches = Batches(found, train, params.train.batch, steps, seed)
    hardware = params.hardware.model_copy(update={"checkpoint_seconds": 1e9})
    with tempfile.TemporaryDirectory() as folder:
        trained = loop.train(batches, params.train, hardware, seed=seed, folder=Path(folder))
    assert trained is not None
    [(sae, _)] = trained
    return quality(sae, original, held_out, torch.zeros(len(held_out), dtype=torch.int64), 1).fvu


def main() -> None:
    params, records = config.load(), []
    print(race.machine())
    for hookpoint in HOOKPOINTS:
        original = store.ActivationStore(ACTIVATIONS / hookpoint)
        for dtype, seed in CASES:
            with tempfile.TemporaryDirectory() as folder:
                found = copy(original, Path(folder), dtype)
                size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
                values = {
                    "bytes": (float(size), "bytes"),
                    "relative error": (relative_error(found, original), "share"),
                    "FVU": (fvu(found, original, params, seed), "share"),
                }
            print(hookpoint, dtype, f"seed {seed}", *(f"{name} {value:.6g}" for name, (value, _) in values.items()))
            case = f"{hookpoint}, {original.rows} x {original.d}, {dtype}, seed {seed}"
            records += [race.record(case, name, float(f"{value:.6g}"), unit) for name, (value, unit) in values.items()]
    race.write("store_dtypes", records)


if __name__ == "__main__":
    main()
