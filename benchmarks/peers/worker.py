"""What all who race share: the batches, the clock, and a worker's talk with `benchmarks/sae_step.py`.

A worker is one process in its peer's own environment. It reads JSON objects, one a line, `{"case": [...], "steps": n}`,
trains n steps and answers `{"seconds": seconds a step, "versions": {...}}`. It sleeps between its turns.
"""

import gc
import itertools
import json
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import NamedTuple

import torch
from torch import Tensor

# Batches that are trained on in turn.
_POOL = 4


class Case(NamedTuple):
    """Width of the activations, number of latents, rows of a batch, active latents of a row."""

    d: int
    latents: int
    batch: int
    k: int = 32

    def __str__(self) -> str:
        return f"d={self.d} latents={self.latents} batch={self.batch} k={self.k}"


def batches(case: Case) -> list[Tensor]:
    """Batches [batch, d] of seeded normal noise around a subspace of 64 dimensions, of mean squared norm d."""
    generator = torch.Generator().manual_seed(0)
    plane = torch.randn(64, case.d, generator=generator) / 8
    rows = torch.randn(_POOL * case.batch, 64, generator=generator) @ plane
    rows += torch.randn(rows.shape, generator=generator) / 2
    rows *= (case.d / rows.square().sum(1).mean()).sqrt()
    return list(rows.split(case.batch))


def timed(step: Callable[[Tensor], object], case: Case) -> Callable[[int], float]:
    """Return what makes so many steps and says how many seconds each took."""
    data = itertools.cycle(batches(case))

    def turn(steps: int) -> float:
        start = time.perf_counter()
        for x in itertools.islice(data, steps):
            step(x)
        return (time.perf_counter() - start) / steps

    return turn


def serve(prepare: Callable[[Case], Callable[[Tensor], object]], package: str) -> None:
    """Answer requests until there are no more; `prepare` makes a case's training step, with optimizer."""
    versions = {name: version(name) for name in ("torch", package)}
    case, turn = None, None
    for line in sys.stdin:
        request = json.loads(line)
        if case != Case(*request["case"]):
            turn = None  # the last case's weights go before the next case's come
            gc.collect()
            torch.manual_seed(0)
            case = Case(*request["case"])
            turn = timed(prepare(case), case)
        print(json.dumps({"seconds": turn(request["steps"]), "versions": versions}), flush=True)
