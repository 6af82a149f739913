"""`python benchmarks/matmul.py`: the dense product of `babelscope.matmul` against `torch.nn.functional.linear`."""

import race
import torch
from torch.nn import functional as F  # noqa: N812

from babelscope import matmul

SHAPES = {"MLP up": (1024, 576, 1536), "MLP down": (1024, 1536, 576), "output head": (512, 576, 49152)}


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
    race.write("matmul", records)


if __name__ == "__main__":
    main()
