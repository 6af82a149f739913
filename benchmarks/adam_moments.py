"""`python benchmarks/adam_moments.py`: what moments of Adam in bfloat16 cost in FVU, on the default's activations.

After every step, the moments are rounded to bfloat16, up or down at random so that the mean is kept. They stay in
float32 tensors, so the program measures what this does to the SAE and not what it saves. Batches, seeds and everything
else are those of the plain run. FVU is measured on the held-out tokens.

The rule, written before the first run: such moments are adopted if, at every hookpoint, the mean over seeds of the
difference in FVU is below the standard deviation of the plain FVU between seeds, and if a machine is at hand that
shows the saving in time. docs/scaling.md has the result.

It reads the outputs of `dvc repro extract`, and takes 5 minutes on one thread of a Zen 4.
"""

import argparse
import statistics
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest.mock import patch

import race
import torch
from store_dtypes import ACTIVATIONS, fvu
from torch import Tensor

from babelscope import config
from babelscope.activations.store import ActivationStore
from babelscope.sae.training.module import SAETraining

HOOKPOINTS, SEEDS = ("layers.14.post_feedforward_layernorm", "layers.5.post_feedforward_layernorm"), (0, 1, 2)
# The moments that are rounded, by the names of torch's AdamW.
PLAIN = "float32"
CASES = {PLAIN: (), "second moment in bfloat16": ("exp_avg_sq",), "both in bfloat16": ("exp_avg", "exp_avg_sq")}


def round_(x: Tensor, generator: torch.Generator) -> None:
    """Round float32 numbers to bfloat16 in place, up with a probability equal to the part that is cut off."""
    bits = x.view(torch.int32)
    bits.add_(torch.randint(2**16, bits.shape, generator=generator, dtype=torch.int32)).bitwise_and_(-(2**16))


def rounding(names: tuple[str, ...], seed: int) -> AbstractContextManager[object]:
    """While open, trainings round these moments after every step."""
    if not names:
        return nullcontext()
    configure, generator = SAETraining.configure_optimizers, torch.Generator().manual_seed(seed)

    def round_all(optimizer: torch.optim.Optimizer, *_: object) -> None:
        for state in optimizer.state.values():
            for name in names:
                round_(state[name], generator)

    def configured(training: SAETraining) -> dict[str, Any]:
        parts = configure(training)
        parts["optimizer"].register_step_post_hook(round_all)
        return parts

    return patch.object(SAETraining, "configure_optimizers", configured)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the FVU with Adam's moments in bfloat16.")
    parser.add_argument("--tokens", type=int, default=300_000, help="training tokens of each SAE")
    tokens = parser.parse_args().tokens
    params = config.load()
    params = params.model_copy(update={"train": params.train.model_copy(update={"tokens": tokens})})
    print(race.machine())
    for hookpoint in HOOKPOINTS:
        store, found = ActivationStore(ACTIVATIONS / hookpoint), dict[str, list[float]]()
        for name, moments in CASES.items():
            for seed in SEEDS:
                with rounding(moments, seed):
                    found.setdefault(name, []).append(fvu(store, store, params, seed))
            print(f"{hookpoint}, {name}:", *(f"{value:.5f}" for value in found[name]), flush=True)
        spread = statistics.stdev(found[PLAIN])
        for name in list(CASES)[1:]:
            more = statistics.mean(a - b for a, b in zip(found[name], found[PLAIN], strict=True))
            print(f"{hookpoint}, {name}: {more:+.5f} on average; seeds differ by {spread:.5f}", flush=True)


if __name__ == "__main__":
    main()
