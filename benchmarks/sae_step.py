"""`make bench`: the training step of `babelscope.sae` against its peers', a dense one, and the floor.

Every peer trains in a process and an environment of its own (`benchmarks/peers/`), all with the same torch, on the same
batches, by the step that its own trainer makes, Adam included, logging not. They take turns, so that what disturbs the
machine disturbs all. Weights stay float32. The race is too short for latents to be dead, so no auxiliary loss is paid.
`python benchmarks/sae_step.py 576x4608x4096 --rounds 3` races one case (d x latents x batch) and writes nothing.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import race
import torch
from peers.worker import Case, timed
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from babelscope.sae.autoencoder import SAE, initialise
from babelscope.sae.module import _project, _renormalise
from babelscope.sae.step import sparse_step

# How many rounds each case is raced for, after one that does not count.
ROUNDS = {Case(576, 4608, 4096): 5, Case(576, 4608, 2048): 5, Case(576, 9216, 4096): 5, Case(2048, 32768, 2048): 3}
PEERS = ("sae-lens", "eai-sparsify", "dictionary-learning")
OURS, DENSE, FLOOR, FLOOR_16 = "babelscope", "dense PyTorch", "floor float32", "floor bfloat16"


class Peer:
    """A worker process in a peer's environment."""

    def __init__(self, name: str) -> None:
        root = Path(__file__).parent.parent
        python = root / ".bench" / name / "bin" / "python"
        if not python.exists():
            raise SystemExit(f"{python}: no such file; `make bench` makes it")
        self.name, self.log, self.versions = name, root / ".bench" / name / "log", {}
        command = [python, root / "benchmarks" / "peers" / f"{name}.py"]
        env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
        pipe = subprocess.PIPE
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, env=env, text=True)

    def turn(self, case: Case, steps: int) -> float:
        """Let the peer train so many steps; seconds a step."""
        try:
            print(json.dumps({"case": case, "steps": steps}), file=self.process.stdin, flush=True)
            answer = json.loads(next(line for line in self.process.stdout if line.startswith("{")))
        except (BrokenPipeError, StopIteration):
            raise SystemExit(f"{self.name} has failed: {self.log}") from None
        self.versions = answer["versions"]
        return answer["seconds"]

    def close(self) -> None:
        """End the process."""
        self.process.communicate()


def training(case: Case, loss: Callable[[SAE, Tensor], Tensor]) -> Callable[[Tensor], None]:
    """Return the step of `babelscope.sae.module`, for any way to compute the loss."""
    sae = initialise(torch.zeros(case.d), case.latents, case.k, encoder_scale=0.5, seed=0)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3, fused=True)

    def step(x: Tensor) -> None:
        optimizer.zero_grad()
        loss(sae, x).backward()
        _project(sae)
        optimizer.step()
        _renormalise(sae)

    return step


def ours(case: Case) -> Callable[[Tensor], None]:
    """`SAETraining.training_step`, without Lightning and the log."""
    idle = torch.zeros(case.latents, dtype=torch.int64)

    def loss(sae: SAE, x: Tensor) -> Tensor:
        result = sparse_step(sae, x)
        idle.add_(len(x)).masked_fill_(result.activity > 0, 0)
        return result.loss

    return training(case, loss)


def dense(case: Case) -> Callable[[Tensor], None]:
    """The same by plain autograd through a dense [batch, latents] matrix."""

    def loss(sae: SAE, x: Tensor) -> Tensor:
        scores = F.linear(x - sae.b_dec, sae.encoder, sae.b_enc)
        values, indices = scores.topk(sae.k, sorted=False)
        z = torch.zeros_like(scores).scatter(1, indices, values.relu())
        return (z @ sae.W_dec + sae.b_dec - x).square().sum() / len(x)

    return training(case, loss)


def floor(case: Case, dtype: torch.dtype) -> Callable[[Tensor], None]:
    """What no exact step is spared: the scores of all latents, and the k best."""
    weight, bias = torch.randn(case.latents, case.d).to(dtype), torch.zeros(case.latents, dtype=dtype)

    @torch.inference_mode()
    def step(x: Tensor) -> None:
        F.linear(x.to(dtype), weight, bias).topk(case.k, sorted=False)

    return step


def seconds(case: Case, peers: list[Peer], rounds: int) -> dict[str, float]:
    """Median seconds a step of every racer."""
    steps = {
        OURS: ours(case),
        DENSE: dense(case),
        FLOOR: floor(case, torch.float32),
        FLOOR_16: floor(case, torch.bfloat16),
    }
    turns = {name: timed(step, case) for name, step in steps.items()}
    turns |= {peer.name: lambda steps, peer=peer: peer.turn(case, steps) for peer in peers}
    times: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(1 + rounds):
        for name, turn in turns.items():
            time = turn(1)
            if number:
                times[name].append(time)
    return {name: statistics.median(values) for name, values in times.items()}


def report(case: Case, rates: dict[str, float], versions: dict[str, str]) -> list[dict[str, Any]]:
    """Print a case's table and return its records."""
    ratio = {name: rates[OURS] / rate for name, rate in rates.items()}
    best = min(ratio[name] for name in (*PEERS, DENSE))
    print(f"\n{case}\n{'':22}{'tokens/s':>10}{'babelscope is':>16}")
    for name, rate in sorted(rates.items(), key=lambda item: -item[1]):
        print(f"{name:22}{rate:10.0f}{ratio[name]:14.2f} x", flush=True)
    own = {"ratio_to_best_peer": best, "ratio_to_floor": ratio[FLOOR], "ratio_to_floor_bfloat16": ratio[FLOOR_16]}
    records = [
        race.record(str(case), name, round(rate), "tokens/s", **(own if name == OURS else {}))
        for name, rate in rates.items()
    ]
    return [record | {"versions": versions} for record in records]


def main() -> None:
    parser = argparse.ArgumentParser(description="Race the training steps of TopK SAEs.")
    parser.add_argument("cases", nargs="*", help="d x latents x batch, e.g. 576x4608x4096; the default writes results")
    parser.add_argument("--rounds", type=int, help="instead of each case's own number")
    arguments = parser.parse_args()
    cases = {Case(*map(int, case.split("x"))): 3 for case in arguments.cases} or ROUNDS
    peers, records = [Peer(name) for name in PEERS], []
    print(race.machine())
    for case, rounds in cases.items():
        rates = {name: case.batch / s for name, s in seconds(case, peers, arguments.rounds or rounds).items()}
        versions = {name: version for peer in peers for name, version in peer.versions.items()}
        if {peer.versions["torch"] for peer in peers} != {torch.__version__}:
            raise SystemExit(f"every peer is to run torch {torch.__version__}")
        records += report(case, rates, versions)
        gc.collect()
    for peer in peers:
        peer.close()
    if cases is ROUNDS:
        race.write("sae_step", records)


if __name__ == "__main__":
    main()
