"""`make bench`: the training step of `babelscope.sae` against its peers', a dense one, and the floor.

Every peer trains in its own process and environment (`benchmarks/peers/`), all with the same torch and batches, by the
step of its own trainer, with Adam but without logging. They take turns, so that disturbances of the machine affect all.
Weights stay float32. The race is too short for latents to be dead, so there is no auxiliary loss.
`python benchmarks/sae_step.py 576x4608x4096 --rounds 3` races one case (d x latents x batch) and writes nothing.
"""

import argparse
import gc
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import race
import torch
from peers.process import Peer
from peers.worker import DEVICE, Case, timed
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from babelscope import config
from babelscope.activations.moments import Moments
from babelscope.config.schema import Train
from babelscope.sae.autoencoder import initialise
from babelscope.sae.training.graph import Graph
from babelscope.sae.training.learner import Learner
from babelscope.sae.training.schedule import BETAS

# Number of rounds of each case, after one that does not count.
ROUNDS = {
    Case(576, 4608, 4096): 7,
    Case(576, 4608, 2048): 5,
    Case(576, 9216, 4096): 5,
    Case(576, 32768, 4096): 3,
    Case(2048, 4608, 4096): 3,
    Case(2048, 32768, 2048): 3,
}
PEERS = [("sae-lens", "fastest"), ("eai-sparsify", "fastest"), ("dictionary-learning", "fastest")]
OURS, OURS_32 = "babelscope", "babelscope float32"
# On a GPU: with the decoder's projection, Adam's step and scaling one after the other (`sae.training.decoder`).
THREE_PASSES = "babelscope three passes"
DENSE, DENSE_16 = "dense PyTorch", "dense PyTorch bfloat16"
FLOOR, FLOOR_16 = "floor float32", "floor bfloat16"
# Steps of a turn: a GPU's are short, and queue up.
STEPS = 1
if DEVICE.type == "cuda":
    PEERS.append(("sae-lens", "defaults"))
    STEPS = 20


def settings(case: Case) -> Train:
    """The default's `train` section, at the widths of the case; no latent counts as dead."""
    train = config.load(Path("params.yaml")).train
    return train.model_copy(update={"latents": case.latents, "k": case.k, "batch": case.batch, "dead_after": 10**12})


def ours(case: Case, screen: torch.dtype | None = None, one_pass: bool = True) -> Callable[[Tensor], None]:
    """`SAETraining.training_step` without Lightning and the log; `screen` replaces the device's screening precision.

    `one_pass`: whether a GPU may update the decoder in one pass.
    """
    learner = Learner(
        settings(case),
        Moments(torch.zeros(case.d), torch.eye(case.d).double()).normalisation(),
        None,
        steps=10**6,
        seed=0,
    ).to(DEVICE)
    optimizer = torch.optim.Adam(learner.parameters(), lr=1e-3, betas=BETAS, fused=True)

    graphs: list[Graph] = []

    def step(x: Tensor) -> None:
        optimizer.zero_grad()
        if Graph.suits(learner, x):
            with override(screen):
                graphs.extend([] if graphs else [Graph(learner, x, None)])
            normal, result = graphs[0](x, None)
            learner.remember(normal, result, 1)
        else:
            with override(screen):
                result = learner.loss(x, world=1)
            result.loss.backward()
        learner.before_update(1, optimizer if one_pass else None)
        optimizer.step()
        learner.after_update(result, 0.0)

    return step


def override(screen: torch.dtype | None) -> AbstractContextManager[object]:
    """Let the step use this screening precision."""
    return nullcontext() if screen is None else patch("babelscope.sae.training.step.screening_dtype", lambda _: screen)


def dense(case: Case, dtype: torch.dtype) -> Callable[[Tensor], None]:
    """The same step by plain autograd through a dense [batch, latents] matrix, products in `dtype`."""
    sae = initialise(torch.zeros(case.d), case.latents, case.k, encoder_scale=0.5, seed=0).to(DEVICE)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3, fused=True)

    def step(x: Tensor) -> None:
        optimizer.zero_grad()
        with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
            scores = F.linear(x - sae.b_dec, sae.encoder, sae.b_enc)
            values, indices = scores.topk(case.k, sorted=False)
            z = torch.zeros_like(scores).scatter(1, indices, values.relu())
            loss = (z @ sae.W_dec + sae.b_dec - x).square().sum() / len(x)
        loss.backward()
        with torch.no_grad():
            gradient, weight = sae.W_dec.grad, sae.W_dec
            gradient.addcmul_((gradient * weight).sum(1, keepdim=True), weight, value=-1)
            optimizer.step()
            weight.div_(weight.norm(dim=1, keepdim=True))

    return step


def floor(case: Case, dtype: torch.dtype) -> Callable[[Tensor], None]:
    """The least work of any exact step: the scores of all latents, and the k best."""
    weight = torch.randn(case.latents, case.d).to(DEVICE, dtype)
    bias = torch.zeros(case.latents, dtype=dtype, device=DEVICE)

    @torch.inference_mode()
    def step(x: Tensor) -> None:
        F.linear(x.to(dtype), weight, bias).topk(case.k, sorted=False)

    return step


def seconds(case: Case, peers: list[Peer], rounds: int) -> dict[str, float]:
    """Median seconds per step of every competitor."""
    steps = {
        OURS: ours(case),
        OURS_32: ours(case, torch.float32),
        DENSE: dense(case, torch.float32),
        FLOOR: floor(case, torch.float32),
        FLOOR_16: floor(case, torch.bfloat16),
    }
    if DEVICE.type == "cuda":
        steps[DENSE_16] = dense(case, torch.bfloat16)
        steps[THREE_PASSES] = ours(case, one_pass=False)
    turns = {name: timed(step, case) for name, step in steps.items()}
    for peer in peers:
        request = {"case": case, "variant": peer.variant}
        turns[peer.name] = lambda steps, peer=peer, request=request: peer.ask(request | {"steps": steps})["seconds"]
    times: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(1 + rounds):
        for name, turn in turns.items():
            time = turn(STEPS)
            if number:
                times[name].append(time)
    return {name: statistics.median(values) for name, values in times.items()}


def report(case: Case, rates: dict[str, float], versions: dict[str, str]) -> list[dict[str, Any]]:
    """Print a case's table and return its records."""
    ratio = {name: rates[OURS] / rate for name, rate in rates.items()}
    ours_and_floors = {OURS, OURS_32, THREE_PASSES, FLOOR, FLOOR_16}
    best = min(value for name, value in ratio.items() if name not in ours_and_floors)
    print(f"\n{case}\n{'':22}{'tokens/s':>10}{'babelscope is':>16}")
    for name, rate in sorted(rates.items(), key=lambda item: -item[1]):
        print(f"{name:22}{rate:10.0f}{ratio[name]:14.2f} x", flush=True)
    own = {"ratio_to_best_peer": best, "ratio_to_floor": ratio[FLOOR], "ratio_to_floor_bfloat16": ratio[FLOOR_16]}
    plain = {"ratio_to_floor": rates[OURS_32] / rates[FLOOR]}
    records = [
        race.record(str(case), name, round(rate), "tokens/s", **{OURS: own, OURS_32: plain}.get(name, {}))
        for name, rate in rates.items()
    ]
    return [record | {"versions": versions} for record in records]


def main() -> None:
    parser = argparse.ArgumentParser(description="Race the training steps of TopK SAEs.")
    parser.add_argument("cases", nargs="*", help="d x latents x batch, e.g. 576x4608x4096; the default writes results")
    parser.add_argument("--rounds", type=int, help="instead of each case's own number")
    arguments = parser.parse_args()
    cases = {Case(*map(int, case.split("x"))): 3 for case in arguments.cases} or ROUNDS
    torch.set_float32_matmul_precision("high")  # as in the peers' processes; of no effect on a CPU
    peers, records = [Peer(*peer) for peer in PEERS], []
    print(race.machine())
    for case, rounds in cases.items():
        rates = {name: case.batch / s for name, s in seconds(case, peers, arguments.rounds or rounds).items()}
        versions = {name: version for peer in peers for name, version in peer.versions.items()}
        if {peer.versions["torch"] for peer in peers} != {version("torch")}:
            raise SystemExit(f"every peer is to run torch {version('torch')}")
        records += report(case, rates, versions)
        gc.collect()
    for peer in peers:
        peer.close()
    if cases is ROUNDS:
        race.write("sae_step" if DEVICE.type == "cpu" else "sae_step.cuda", records)


if __name__ == "__main__":
    main()
