"""`python benchmarks/sae_loop.py`: the time that Lightning, reading, logging and checkpoints add to the bare step.

It trains the SAE of the default on its activations (`dvc repro extract` makes them), in turn: with
`sae.training.loop.train`, as the stage `train` does; with the same steps without Lightning, on batches in memory; and
with these steps on batches that are read from the store.
"""

import statistics
import tempfile
import time
from collections.abc import Iterable
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


def bare(learner: Learner, pairs: Iterable[list[Pair]], steps: int, rate: float, settings: schema.Train) -> float:
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
        share = lr_multiplier(number, steps, settings.warmup, settings.decay)
        for group in optimizer.param_groups:
            group["lr"] = rate * share
        result = learner.loss(*pair, world=1)
        result.loss.backward()
        learner.before_update(1, optimizer)
        optimizer.step()
        learner.after_update(result, (number + 1) / steps)
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
    [(target, _)] = batches.moments()
    times: dict[str, list[float]] = {"bare step": [], "and reading": [], "Lightning loop": []}
    started: list[float] = []
    for _ in range(ROUNDS):
        for name, source in (("bare step", pairs), ("and reading", batches.read())):
            learner = Learner(settings, target.normalisation(), None, steps=steps, seed=params.seed)
            times[name].append(bare(learner, source, steps, rate, settings))
        with tempfile.TemporaryDirectory() as folder:
            started.clear()

            def write(step: int, metrics: object) -> None:
                started.append(time.perf_counter())

            train(batches, settings, params.hardware, seed=params.seed, folder=Path(folder), write=write)
        # From the first logged step to the last: start-up and the pass for the mean are paid once, not per step.
        times["Lightning loop"].append((started[-1] - started[0]) * steps / (steps - settings.log_every))
    seconds = {name: statistics.median(values) for name, values in times.items()}
    case = f"{HOOKPOINT} latents={settings.latents} batch={settings.batch}, {race.machine()}"
    print(case)
    records = []
    for name, value in seconds.items():
        speed = round(steps * settings.batch / value)
        print(f"{name:16}{speed:9d} tokens/s")
        shares = [one / floor for one, floor in zip(times[name], times["bare step"], strict=True)]
        ratios = {"": statistics.median(shares), "_lowest": min(shares), "_highest": max(shares)}
        extra = {f"ratio_to_bare_step{key}": round(ratio, 3) for key, ratio in ratios.items()}
        records.append(race.record(case, name, speed, "tokens/s", **extra))
        spread = f"{min(shares):.3f} to {max(shares):.3f} in {ROUNDS} rounds"
        print(f"{'':16}{statistics.median(shares):.3f} times the time of the bare step ({spread})")
    race.write("sae_loop", records)


if __name__ == "__main__":
    main()
