"""`python benchmarks/sae_choices.py`: the effect of each choice of the training, found by undoing one at a time.

Trains the default's SAE on the default's activations at three hookpoints, as the stage `train` does it, and measures
FVU and dead latents on held-out rows: with params.yaml, and with one choice undone. There is one seed: differences of
one per cent of FVU are noise.

It reads the outputs of `make experiment NAME=smollm2-135m`; its figures in docs/ are of that model.
"""

import tempfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import polars as pl
import race
import torch

from babelscope import config
from babelscope.activations.batches import Batches
from babelscope.activations.store import ActivationStore
from babelscope.sae.metrics import Quality, quality
from babelscope.sae.training.loop import train

HOOKPOINTS = ("layers.14.mlp", "layers.18.mlp", "layers.29.mlp")
# Params that undo a choice, or the name of a constant of the library and its other value.
UNDONE: dict[str, dict[str, Any] | tuple[str, Any]] = {
    "as in params.yaml": {},
    "no auxiliary loss": {"aux_k_coefficient": 0.0},
    "auxiliary loss of the paper (1/32)": {"aux_k_coefficient": 1 / 32},
    "dead after 100,000 tokens": {"dead_after": 100_000},
    "Adam's beta2 0.999": ("babelscope.sae.training.module.BETAS", (0.9, 0.999)),
    "no whitening": ("babelscope.activations.moments._FEW", 0),
    "decay over the last 20 %": {"decay": 0.2},
    "encoder as long as the decoder": {"encoder_scale": 1.0},
    "half the learning rate": {"learning_rate": 0.5},
    "twice the learning rate": {"learning_rate": 2.0},
    "batchtopk": {"activation": "batchtopk"},
    "jumprelu": {"activation": "jumprelu"},
    "matryoshka 576, 1152, 2304": {"matryoshka": [576, 1152, 2304]},
}


def measure(params: config.Config, hookpoint: str, change: dict[str, Any] | tuple[str, Any]) -> Quality:
    """Train with one change and measure."""
    settings = params.train
    context: AbstractContextManager[object] = nullcontext()
    if isinstance(change, tuple):
        context = patch(*change)
    else:
        if "learning_rate" in change:
            change = {"learning_rate": change["learning_rate"] * (params.train.learning_rate or 0.0)}
        settings = settings.model_copy(update=change)
    store = ActivationStore(Path("data/activations") / hookpoint)
    table = pl.read_parquet("data/activations/tokens.parquet")
    rows = {split: table.filter(pl.col("split") == split)["row"].to_torch() for split in ("train", "eval")}
    batches = Batches(store, rows["train"], settings.batch, -(-settings.tokens // settings.batch), params.seed)
    with tempfile.TemporaryDirectory() as folder, context:
        trained = train(batches, settings, params.hardware, seed=params.seed, folder=Path(folder))
    assert trained is not None
    return quality(trained[0][0], store, rows["eval"], torch.zeros(len(rows["eval"]), dtype=torch.int64), 1)


def main() -> None:
    params = config.load()
    records = []
    print(f"{'':36}" + "".join(f"{name:>22}" for name in HOOKPOINTS) + f"  FVU, dead; {race.machine()}")
    for name, change in UNDONE.items():
        found = {hookpoint: measure(params, hookpoint, change) for hookpoint in HOOKPOINTS}
        print(f"{name:36}" + "".join(f"{q.fvu:13.4f}{q.dead_share:9.2%}" for q in found.values()), flush=True)
        for hookpoint, q in found.items():
            figures = {"dead_share": round(q.dead_share, 5), "l0": round(q.l0, 2)}
            records.append(race.record(hookpoint, name, round(q.fvu, 5), "FVU") | figures)
    race.write("sae_choices", records)


if __name__ == "__main__":
    main()
