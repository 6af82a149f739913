"""`python benchmarks/busy.py`: stages on a machine of which one core is busy with other work.

`extract` and `ablate` run as processes, imports included, on some texts that `make repro` left: alone, and next to a
busy process; with OpenMP threads that spin for 10,000 turns while they wait (babelscope's setting), for 300,000
(libgomp's default) and not at all. Runs are interleaved. The goal: at most 2.2 times as long next to the busy process.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl
import race
from ruamel.yaml import YAML

ROOT = Path(__file__).parent.parent
GOAL = 2.2
# Every n-th text: one round takes a minute, not an hour.
STEP = {"extract": 16, "ablate": 8}
POLICIES: dict[str, dict[str, str]] = {
    "babelscope's setting": {},
    "libgomp's own": {"GOMP_SPINCOUNT": "300000"},
    "threads that sleep at once": {"OMP_WAIT_POLICY": "passive"},
}
CHANGES = {"by_layer": False, "others_tokens": 50, "control_draws": 1, "bootstrap": 10}


@contextmanager
def busy_core() -> Iterator[None]:
    """A process that is busy until the block ends."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def lay_out(folder: Path, stage: str) -> None:
    """Write the stage's inputs: links to the repository's data, fewer texts, and params with fewer conditions."""
    (folder / "data/corpus").mkdir(parents=True)
    for name in ("counts", "neurons", "sae", "scores", "stream"):
        (folder / "data" / name).symlink_to(ROOT / "data" / name)
    texts = pl.read_parquet(ROOT / "data/corpus/texts.parquet").gather_every(STEP[stage])
    for name in ("texts", "train"):
        texts.write_parquet(folder / f"data/corpus/{name}.parquet")
    yaml = YAML()
    params = yaml.load(ROOT / "params.yaml")
    params["ablate"] |= CHANGES
    yaml.dump(params, folder / "params.yaml")


def runner(stage: str, folder: Path, variables: dict[str, str], *, busy: bool) -> Callable[[], None]:
    """Runs the stage once in `folder`; what it writes is deleted."""
    plain = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_", "KMP_", "DVC_"))}
    environment = plain | {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"} | variables

    def once() -> None:
        command = [sys.executable, str(ROOT / "stages" / f"{stage}.py")]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr)
        for path in ("data/activations", "data/ablation", "metrics"):
            shutil.rmtree(folder / path, ignore_errors=True)

    def beside() -> None:
        with busy_core():
            once()

    return beside if busy else once


def measure(stage: str, policies: dict[str, dict[str, str]], rounds: int) -> list[dict[str, Any]]:
    """Print a stage's seconds and return its records."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lay_out(folder, stage)
        times = race.race(
            {
                f"{policy}{', one core busy' * busy}": runner(stage, folder, variables, busy=busy)
                for policy, variables in policies.items()
                for busy in (False, True)
            },
            rounds, warmup=0,
        )  # fmt: skip
    records = []
    for name, seconds in times.items():
        ratio = seconds / times[name.partition(",")[0]]
        print(f"{stage:10}{name:44}{seconds:8.1f} s{ratio:8.2f} x alone", flush=True)
        records.append(
            race.record(f"{stage}, every {STEP[stage]}th text", name, round(seconds, 1), "s", ratio_to_floor=ratio)
        )
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description="Time stages alone and beside a busy core.")
    parser.add_argument("--rounds", type=int, default=3, help="the median of so many counts")
    parser.add_argument("--ours", action="store_true", help="babelscope's setting only")
    arguments = parser.parse_args()
    policies = dict(list(POLICIES.items())[:1]) if arguments.ours else POLICIES
    print(race.machine(), f"(goal: {GOAL} x alone)")
    race.write("busy", [record for stage in STEP for record in measure(stage, policies, arguments.rounds)])


if __name__ == "__main__":
    main()
