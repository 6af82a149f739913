"""`python benchmarks/learning_rate.py`: whether the learning-rate rule holds for other widths and training lengths.

Trains the default's SAE (TopK, k 32, batch 1024) on the default's activations of one hookpoint at the rule's rate
(`sae.training.schedule.learning_rate`), at half and at twice that, and measures FVU and dead latents on held-out
rows. Results are kept under `.bench/learning_rate/`, so that a killed sweep resumes.

It reads the outputs of `make experiment NAME=smollm2-135m`; its figures in docs/ are of that model.
"""

import argparse
import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import polars as pl
import race
import torch

from babelscope import config
from babelscope.activations.batches import Batches
from babelscope.activations.store import ActivationStore
from babelscope.core.files import read_json, write_json
from babelscope.sae.metrics import quality
from babelscope.sae.training.loop import train
from babelscope.sae.training.schedule import learning_rate

HOOKPOINT, BATCH = "layers.14.mlp", 1024
# Latents and tokens, the fast ones first.
CELLS = [
    (2304, 300_000),
    (4608, 360_000),
    (2304, 1_000_000),
    (9216, 300_000),
    (18432, 300_000),
    (65536, 300_000),
    (2304, 10_000_000),
]
FACTORS = (1.0, 0.5, 2.0)
SCRATCH = Path(".bench/learning_rate")


def measure(params: config.Config, latents: int, tokens: int, rate: float) -> dict[str, float]:
    """Held-out `fvu` and `dead_share` of one training, read from a file if it is known."""
    steps = -(-tokens // BATCH)
    changes = {"latents": latents, "tokens": tokens, "batch": BATCH, "learning_rate": rate}
    settings = params.train.model_copy(update=changes)
    key = hashlib.sha256(json.dumps([settings.model_dump(), params.seed]).encode()).hexdigest()[:32]
    known = SCRATCH / f"{key}.json"
    if not known.exists():
        store = ActivationStore(Path("data/activations") / HOOKPOINT)
        table = pl.read_parquet("data/activations/tokens.parquet")
        rows = {split: table.filter(pl.col("split") == split)["row"].to_torch() for split in ("train", "eval")}
        batches = Batches(store, rows["train"], BATCH, steps, params.seed)
        with tempfile.TemporaryDirectory() as folder:
            trained = train(batches, settings, params.hardware, seed=params.seed, folder=Path(folder))
        assert trained is not None
        found = quality(trained[0][0], store, rows["eval"], torch.zeros(len(rows["eval"]), dtype=torch.int64), 1)
        write_json(known, {"fvu": found.fvu, "dead_share": found.dead_share})
    result: dict[str, float] = read_json(known)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description="Sweep the learning rate around the rule.")
    parser.add_argument(
        "--cells", type=int, default=len(CELLS), help="only so many, the quick ones first; writes nothing"
    )
    cells = parser.parse_args().cells
    params = config.load()
    records: list[dict[str, Any]] = []
    print(
        f"{HOOKPOINT}, batch {BATCH}, {race.machine()}\n{'latents':>8}{'tokens':>10}{'rate':>10}{'FVU':>9}{'dead':>8}"
    )
    for latents, tokens in CELLS[:cells]:
        rule = learning_rate(latents, -(-tokens // BATCH))
        found = {factor: measure(params, latents, tokens, rule * factor) for factor in FACTORS}
        best = min(result["fvu"] for result in found.values())
        for factor, result in sorted(found.items()):
            mark = " (the rule)" if factor == 1 else ""
            print(
                f"{latents:8}{tokens:10}{rule * factor:10.2e}{result['fvu']:9.4f}{result['dead_share']:8.2%}{mark}",
                flush=True,
            )
            record = race.record(
                f"latents={latents} tokens={tokens}", f"rule * {factor:g}", round(result["fvu"], 5), "FVU"
            )
            extra = {"learning_rate": rule * factor, "dead_share": round(result["dead_share"], 5)}
            records.append(record | extra | {"ratio_to_best_rate": round(result["fvu"] / best, 4)})
    if cells == len(CELLS):
        race.write("learning_rate", records)


if __name__ == "__main__":
    main()
