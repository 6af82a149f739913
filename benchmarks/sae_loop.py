"""`python benchmarks/sae_loop.py`: the time that Lightning, reading, logging and checkpoints add to the bare step.

It trains the default's SAE on its activations (`dvc repro extract` makes them) with `sae.training.loop.train`, as the
stage `train` does, and with the same steps without Lightning on batches in memory, in turn.
"""

import statistics
import tempfile
import time
from pathlib import Path

import polars as pl
import race
import torch

from babelscope import config
from babelscope.activations.batches import Batches, Pair
from babelscope.activations.store import ActivationStore
from babelscope.config import schema
from babelscope.models import hardware
from babelscope.sae.training.learner import Learner
from babelscope.sae.training.loop import train
from babelscope.sae.training.schedule import BETAS, learning_rate, lr_multiplier

ROUNDS, HOOKPOINT = 9, "layers.14.post_feedforward_layernorm"


def bare(learner: Learner, pairs: list[list[Pair]], rate: float, settings: schema.Train) -> float:
    """Seconds for all steps."""
    encoder, others = (
        learner.sae.encoder,
        [weight for weight in learner.parameters() if weight is not learner.sae.encoder],
    )
    groups = [{"params": [encoder], "weight_decay": settings.weight_decay}, {"params": others}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=BETAS, weight_decay=0.0, fused=True)
    start = time.perf_counter()
    for number, [pair] in enumerate(pairs):
        optimizer.zero_grad()
        share = lr_multiplier(number, len(pairs), settings.warmup, settings.decay)
        for group in optimizer.param_groups:
            group["lr"] = rate * share
        result = learner.loss(*pair, world=1)
        result.loss.backward()
        learner.before_update(1, optimizer)
        optimizer.step()
        learner.after_update(result, (number + 1) / len(pairs))
    return time.perf_counter() - start


def main() -> None:
    params = config.load()
    hardware.keep_freed_memory()  # as `train` does, for the bare step, too
    settings = params.train
    store = ActivationStore(Path("data/activations") / HOOKPOINT)
    rows = pl.read_parquet("data/activations/tokens.parquet").filter(split="train")["row"].to_torch()
    steps = -(-settings.tokens // settings.batch)
    batches = Batches(store, rows, settings.batch, steps, params.seed)
    pairs = list(batches.read())
    rate = settings.learning_rate or learning_rate(settings.latents, steps)
    [(target, source)] = batches.moments()
    times: dict[str, list[float]] = {"bare step": [], "Lightning loop": []}
    started: list[float] = []
    for _ in range(ROUNDS):
        learner = Learner(
            settings, target.normalisation(), source and source.normalisation(), steps=steps, seed=params.seed
        )  # fmt: skip
        times["bare step"].append(bare(learner, pairs, rate, settings))
        with tempfile.TemporaryDirectory() as folder:
            started.clear()

            def write(step: int, metrics: object) -> None:
                started.append(time.perf_counter())

            train(batches, settings, params.hardware, seed=params.seed, folder=Path(folder), write=write)
        # From the first logged step to the last: start-up and the pass for the mean are paid once, not per step.
        times["Lightning loop"].append((started[-1] - started[0]) * steps / (steps - settings.log_every))
    seconds = {name: statistics.median(values) for name, values in times.items()}
    taxes = [b / a for a, b in zip(times["bare step"], times["Lightning loop"], strict=True)]
    tax = statistics.median(taxes)
    case = f"{HOOKPOINT} latents={settings.latents} batch={settings.batch}, {race.machine()}"
    print(case)
    records = []
    for name, value in seconds.items():
        speed = round(steps * settings.batch / value)
        print(f"{name:16}{speed:9d} tokens/s")
        ratios = {"ratio_to_bare_step": tax, "ratio_lowest": min(taxes), "ratio_highest": max(taxes)}
        extra = {key: round(ratio, 3) for key, ratio in ratios.items()} if name != "bare step" else {}
        records.append(race.record(case, name, speed, "tokens/s", **extra))
    spread = f"{min(taxes):.3f} to {max(taxes):.3f} in {ROUNDS} rounds"
    print(f"the loop takes {tax:.3f} times as long as the bare step ({spread})")
    race.write("sae_loop", records)


if __name__ == "__main__":
    main()
