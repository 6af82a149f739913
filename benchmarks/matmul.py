"""`python benchmarks/matmul.py`: the dense product of `babelscope.models.matmul` against `torch.nn.functional.linear`.

It also measures time and memory if oneDNN keeps few of its compiled kernels, in passes that never repeat a number of
rows: child processes in turn, through half of the embedded model's blocks.
"""

import os
import random
import statistics
import subprocess
import sys
import time

import race
import torch
from torch.nn import functional as F  # noqa: N812

from babelscope.models import matmul

SHAPES = {"MLP up": (1024, 576, 1536), "MLP down": (1024, 1536, 576), "output head": (512, 576, 49152)}

KEPT = (64, 1024)  # ours, oneDNN's own
BLOCK = [(576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576)]
BLOCKS, PASSES, ROUNDS = 15, 150, 3


def passes() -> None:
    """In a child process: print the seconds of the passes and the MiB of anonymous memory that they added."""
    draw = random.Random(0)
    weights, x = [torch.randn(n, d) for d, n in BLOCK], torch.randn(1024, 1536)
    with torch.inference_mode():
        for weight in weights:
            matmul.linear(x[:, : weight.shape[1]].contiguous(), weight)
        before, start = race.memory("RssAnon"), time.perf_counter()
        for rows in draw.sample(range(64, 1024), PASSES):
            inputs = {d: x[:rows, :d].contiguous() for d in (576, 1536)}
            for weight in weights * BLOCKS:
                matmul.linear(inputs[weight.shape[1]], weight)
        print(time.perf_counter() - start, (race.memory("RssAnon") - before) / 2**20)


def kernels() -> list[dict[str, object]]:
    """Passes with few and with many kept kernels, in turn."""
    taken: dict[int, list[tuple[float, float]]] = {kept: [] for kept in KEPT}
    for _ in range(ROUNDS):
        for kept in KEPT:
            env = os.environ | {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": str(kept)}
            done = subprocess.run(
                [sys.executable, __file__, "passes"], env=env, capture_output=True, text=True, check=True
            )
            seconds, mib = map(float, done.stdout.split())
            taken[kept].append((seconds, mib))
    medians = {kept: [statistics.median(column) for column in zip(*rows, strict=True)] for kept, rows in taken.items()}
    ratio = medians[KEPT[0]][0] / medians[KEPT[1]][0]
    for kept, (seconds, mib) in medians.items():
        print(f"{PASSES} passes, {kept} kernels kept: {seconds:.1f} s, {mib:.0f} MiB more")
    print(f"seconds: {ratio:.3f} of those with {KEPT[1]}")
    records = [race.record(f"{kept} kernels kept", "babelscope", mib, "MiB") for kept, (_, mib) in medians.items()]
    return [
        *records,
        race.record(f"{KEPT[0]} kernels kept, seconds to those with {KEPT[1]}", "babelscope", ratio, "ratio"),
    ]


def main() -> None:
    records = []
    print(f"{'case':12} {'babelscope':>12} {'F.linear':>12} {'ratio':>6}   GFLOP/s, {race.machine()}")
    with torch.inference_mode():
        for case, (rows, d, n) in SHAPES.items():
            x, weight = torch.randn(rows, d), torch.randn(n, d)
            runners = {
                "babelscope": lambda x=x, w=weight: matmul.linear(x, w),
                "F.linear": lambda x=x, w=weight: F.linear(x, w),
            }
            seconds = race.race(runners, rounds=15)
            rate = {name: 2e-9 * rows * d * n / s for name, s in seconds.items()}
            ratio = rate["babelscope"] / rate["F.linear"]
            print(f"{case:12} {rate['babelscope']:12.0f} {rate['F.linear']:12.0f} {ratio:6.2f}")
            records.append(race.record(case, "babelscope", rate["babelscope"], "GFLOP/s", ratio_to_best_peer=ratio))
            records.append(race.record(case, "F.linear", rate["F.linear"], "GFLOP/s"))
    race.write("matmul", [*records, *kernels()])


if __name__ == "__main__":
    passes() if sys.argv[1:] == ["passes"] else main()
