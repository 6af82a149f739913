"""Stage `retrain <hookpoint>`: the SAE of one hookpoint once more, from another seed, for `stability` to compare.

It is no training to look at in MLflow: the curve of the first one stands for both.
"""

import shutil
import sys
from pathlib import Path

import polars as pl

from babelscope import config
from babelscope.activations.batches import Batches
from babelscope.activations.store import ActivationStore
from babelscope.core import stage
from babelscope.core.files import read_table, write_atomically
from babelscope.core.fingerprint import dvc_md5, fingerprint
from babelscope.core.resume import scratch
from babelscope.models import hardware
from babelscope.sae import checkpoint

TOKENS = Path("data/activations/tokens.parquet")


def main() -> None:
    params = config.load()
    hookpoint = config.hookpoint_argument(sys.argv, params)
    hardware.prepare(params.hardware)
    source, out = Path("data/activations") / hookpoint, Path("data/sae_again") / hookpoint
    store, seed = ActivationStore(source), params.stability.seed
    inputs = ActivationStore(source / "input") if params.train.transcode else None
    rows = read_table(TOKENS).filter(split="train")["row"].to_torch()
    steps = -(-params.train.tokens // params.train.batch)
    batches = Batches(store, rows, params.train.batch, steps, seed, inputs)

    from babelscope.sae.training import module

    knobs = {"seed": seed, "train": params.train.model_dump()}
    work = fingerprint(f"retrain@{hookpoint}", knobs, {str(path): dvc_md5(path) for path in (source, TOKENS)})
    result = module.train(
        batches, params.train, params.hardware,
        seed=seed, write=[lambda step, metrics: None], checkpoint=scratch(work) / "state.pt",
    )  # fmt: skip
    if result is None:
        return
    [(sae, history)] = result
    fvu = history[-1]["fvu"]
    checkpoint.save(sae, out, {"model_name": store.index["model"], "hook_name": hookpoint})
    write_atomically(out / "history.csv", pl.DataFrame(history).write_csv)
    shutil.rmtree(scratch(work), ignore_errors=True)
    stage.table(["hookpoint", "seed", "FVU (last batch)"], [[hookpoint, seed, f"{fvu:.3f}"]])


if __name__ == "__main__":
    stage.run(main)
