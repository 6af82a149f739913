"""`python tools/kills.py --kills 40 --seed 0`: `kill -9` at random moments of the real pipeline, over all stages.

There are two clones with small params. A calm one runs undisturbed. A stormy one is killed in every stage in turn, at a
random moment of the time that the stage (and DVC after it) took in the calm one. Killed is the stage's process, the DVC
process (with which the stage must end), or the whole process group. After each kill `dvc repro` resumes. It fails if

- after a kill, a file under a final name is not byte for byte that of the calm run;
- a training that left a checkpoint does not resume from it;
- the final state differs from the calm run: hashes in dvc.lock, MLflow runs (kind and status); or a temporary file is
  left in an output, a checkpoint in .scratch, or a lock that stops DVC.
"""

import argparse
import hashlib
import itertools
import math
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "tests"))

import psutil
import warm
from clone import clone, environment, hashes, ran, run, runs, set_params

RESUMED = re.compile(r"resumed at step (\d+)")
TRAININGS = ("train@", "retrain@", "stream")
VICTIMS = ("stage", "dvc", "group")
OUTPUTS = ("data", "metrics", "reports")
Process = subprocess.Popen[bytes] | warm.Process
Start = Callable[[Path, Path], Process]
_POLL = 0.02


@dataclass
class Kill:
    """What was killed, in which stage, seconds after its start, and whether a training had a checkpoint."""

    stage: str
    victim: str
    after: float
    checkpoint: bool = False
    resumed: int | None = None


def repro(repo: Path, log: Path) -> Process:
    """`dvc repro` in its own process group; its output and that of its stages go to a file."""
    with log.open("wb") as out:
        return subprocess.Popen(
            ["dvc", "repro"], cwd=repo, env=environment() | {"PYTHONUNBUFFERED": "1"}, stdout=out,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


def follow(process: Process, log: Path) -> Iterator[list[str]]:
    """Yield the stages that the process has begun so far, repeatedly until it ends."""
    while process.poll() is None:
        yield ran(log.read_text(errors="replace"))
        time.sleep(_POLL)


def durations(repo: Path) -> dict[str, float]:
    """Run the pipeline undisturbed; returns the seconds from each stage's start to the next one's."""
    log, starts = repo.with_suffix(".log"), dict[str, float]()
    process = repro(repo, log)
    for begun in follow(process, log):
        for name in begun:
            starts.setdefault(name, time.monotonic())
    assert process.returncode == 0, log.read_text()
    moments = [*starts.values(), time.monotonic()]
    return {name: end - start for name, (start, end) in zip(starts, itertools.pairwise(moments), strict=True)}


def strike(process: Process, victim: str) -> bool:
    """Kill `stage`, `dvc` or `group`, and wait for its end; false if no process of a stage runs."""
    family = psutil.Process(process.pid).children(recursive=True)
    if victim == "stage":
        if not family:
            return False
        for child in family:
            child.kill()
        with suppress(subprocess.TimeoutExpired):  # the stage had ended: DVC did not notice the kill
            process.wait(20)
        return process.poll() is not None
    if victim == "dvc":
        process.kill()
    else:
        os.killpg(process.pid, signal.SIGKILL)
        psutil.wait_procs(family)
    process.wait()
    return True


def disturbed(repo: Path, plan: dict[str, list[float]], victim: str, start: Start) -> tuple[Kill | None, str]:
    """One `dvc repro`, killed at the first moment planned for a stage that runs; returns the kill and the log."""
    log, stage, started, due = repo.with_suffix(".log"), "", 0.0, math.inf
    process = start(repo, log)
    for begun in follow(process, log):
        if begun and begun[-1] != stage:
            stage, started = begun[-1], time.monotonic()
            if due == math.inf and plan.get(stage):
                due = started + plan[stage].pop(0)
        after = time.monotonic() - started
        if started + after >= due and strike(process, victim):
            checkpoint = stage.startswith(TRAININGS) and bool(list(repo.glob(".scratch/*/last.ckpt")))
            return Kill(stage, victim, after, checkpoint), log.read_text(errors="replace")
    return None, log.read_text(errors="replace")


def digests(repo: Path) -> dict[str, str]:
    """MD5 of every file of the outputs under a final name."""
    found = {}
    for path in sorted(path for folder in OUTPUTS for path in (repo / folder).rglob("*")):
        try:
            if path.is_file() and path.suffix != ".tmp" and path.name != ".gitignore":
                found[str(path.relative_to(repo))] = hashlib.md5(path.read_bytes()).hexdigest()
        except FileNotFoundError:  # a stage that has outlived DVC still runs
            continue
    return found


def ride(
    repo: Path,
    plan: dict[str, list[float]],
    victims: Iterator[str],
    whole: dict[str, str],
    kills: int = sys.maxsize,
    say: Callable[[str], object] = print,
    start: Start = repro,
) -> list[Kill]:
    """Run the pipeline of `repo` to its end, with kills as planned; `whole`: `digests` of an undisturbed run.

    `start` starts `dvc repro` in a process group of its own.

    Raises
    ------
    AssertionError: a half-written file was left, something was lost, or a run in MLflow was not closed.
    """
    done = list[Kill]()
    while True:
        kill, text = disturbed(repo, plan if len(done) < kills else {}, next(victims), start)
        for one in done:  # the next run may have been killed before it resumed
            begun = text.partition(f"Running stage '{one.stage}'")[2].partition("Running stage")[0]
            if one.resumed is None and (found := RESUMED.search(begun)):
                one.resumed = int(found[1])
        if kill is None:
            assert "failed to reproduce" not in text, text
            break
        done.append(kill)
        say(f"{len(done):3d}  {kill.stage:30s} {kill.victim:6s} after {kill.after:5.1f} s")
        broken = {name for name, digest in digests(repo).items() if whole.get(name) != digest}
        assert not broken, f"{kill}: half-written, or different from the undisturbed run: {sorted(broken)}"
    lost = [kill for kill in done if kill.checkpoint and kill.resumed is None]
    assert not lost, f"not resumed from their checkpoints: {lost}"
    assert ran(run(repo, "dvc", "repro")) == ["track"], "the pipeline had not come to its end"
    assert {status for _, status in runs(repo)} == {"FINISHED"}
    leftovers = [path for path in repo.glob(".scratch/*") if path.name != "locks"]
    leftovers += [path for folder in OUTPUTS for path in (repo / folder).rglob("*.tmp")]
    assert not leftovers, leftovers
    return done


def storm(calm: Path, stormy: Path, kills: int, seed: int) -> list[Kill]:
    """Run both clones and compare; see the module, and `ride`."""
    took = durations(calm)
    draw = random.Random(seed)
    print(f"undisturbed: {len(took)} stages in {sum(took.values()):.0f} s")
    # A planned moment may come after its stage has ended. The stage then does not run again, and its other moments are
    # unused, so that there may be fewer kills than asked for.
    stages = list(itertools.islice(itertools.cycle(draw.sample(list(took), len(took))), math.ceil(1.3 * kills)))
    plan = {name: [draw.uniform(0, took[name]) for _ in range(stages.count(name))] for name in took}
    done = ride(stormy, plan, (draw.choice(VICTIMS) for _ in itertools.count()), digests(calm), kills)
    assert hashes(stormy) == hashes(calm)
    assert runs(stormy) == runs(calm)
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where the two clones are made; default: a temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        for name in ("calm", "stormy"):
            (folder / name).mkdir(parents=True)
            clone(folder / name)
            set_params(folder / name, {"train.tokens": 60_000})
        done = storm(folder / "calm", folder / "stormy", arguments.kills, arguments.seed)
    for victim in VICTIMS:
        print(f"{victim}: {sum(kill.victim == victim for kill in done)} kills", end="; ")
    trained = [kill for kill in done if kill.checkpoint]
    print(f"{len(trained)} trainings resumed from their checkpoint; same hashes and MLflow runs as undisturbed")


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    main()
