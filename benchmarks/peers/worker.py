"""What all competitors share: the batches, the clock, and the protocol between workers and benchmarks.

A worker is one process in its peer's own environment. It reads JSON objects, one per line:

- `{"case": [...], "steps": n, "variant": name}`: train n steps on seeded noise; the answer is `{"seconds": seconds a
  step}`. If there is a CUDA device, the steps and batches are on it.
- `{"case": [...], "train": [...], "data": file, "scale": s, "weights": file}`: train a whole run (the fields of `Run`)
  on the rows of a safetensors file, in their order and times s, and write the weights to another.

Every answer also says `"versions": {...}`.
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
from safetensors.torch import load_file, save_file
from torch import Tensor

# Number of batches, used in turn.
_POOL = 4
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Case(NamedTuple):
    """Width of the activations, number of latents, rows of a batch, active latents of a row."""

    d: int
    latents: int
    batch: int
    k: int = 32

    def __str__(self) -> str:
        return f"d={self.d} latents={self.latents} batch={self.batch} k={self.k}"


class Run(NamedTuple):
    """A peer's settings for a run: number of steps, peak learning rate, and tokens after which a latent is dead.

    A peer's own warm-up and decay are scaled to 5 % and 20 % of the steps. `variant` selects among the peer's own
    settings; each script lists its variants.
    """

    steps: int
    learning_rate: float
    dead_after: int
    variant: str


class Training(NamedTuple):
    """A peer's training step, and its weights in babelscope's layout: encoder, W_dec, b_enc, b_dec."""

    step: Callable[[Tensor], object]
    weights: Callable[[], tuple[Tensor, Tensor, Tensor, Tensor]]


Prepare = Callable[[Case, Run], Training]


def batches(case: Case) -> list[Tensor]:
    """Batches [batch, d] of seeded normal noise around a subspace of 64 dimensions, of mean squared norm d."""
    generator = torch.Generator().manual_seed(0)
    plane = torch.randn(64, case.d, generator=generator) / 8
    rows = torch.randn(_POOL * case.batch, 64, generator=generator) @ plane
    rows += torch.randn(rows.shape, generator=generator) / 2
    rows *= (case.d / rows.square().sum(1).mean()).sqrt()
    return list(rows.split(case.batch))


def timed(step: Callable[[Tensor], object], case: Case) -> Callable[[int], float]:
    """Return a function that makes a number of steps and returns the seconds per step."""
    data = itertools.cycle([batch.to(DEVICE) for batch in batches(case)])

    def turn(steps: int) -> float:
        start = time.perf_counter()
        for x in itertools.islice(data, steps):
            step(x)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / steps

    return turn


def train(training: Training, case: Case, run: Run, data: str, scale: float, weights: str) -> None:
    """Train a whole run and write the weights."""
    for x in load_file(data)["activations"].split(case.batch)[: run.steps]:
        training.step(x.to(DEVICE).float() * scale)
    names = ("encoder", "W_dec", "b_enc", "b_dec")
    tensors = zip(names, training.weights(), strict=True)
    save_file({name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors}, weights)


def serve(prepare: Prepare, package: str) -> None:
    """Answer requests until there are no more; `prepare` makes a case's training step, with optimizer."""
    versions = {name: version(name) for name in ("torch", package)}
    torch.set_float32_matmul_precision("high")  # as sparsify asks for; of no effect on a CPU
    case, turn = None, None
    for line in sys.stdin:
        request = json.loads(line)
        answer = {"versions": versions}
        if "train" in request:
            torch.manual_seed(0)
            wanted, run = Case(*request["case"]), Run(*request["train"])
            train(prepare(wanted, run), wanted, run, request["data"], request["scale"], request["weights"])
        else:
            if case != Case(*request["case"]):
                turn = None  # free the last case's weights before the next case
                gc.collect()
                torch.manual_seed(0)
                case = Case(*request["case"])
                endless = Run(10**6, 2e-4 / (case.latents / 2**14) ** 0.5, 10**7, request["variant"])
                turn = timed(prepare(case, endless).step, case)
            answer["seconds"] = turn(request["steps"])
        print(json.dumps(answer), flush=True)
