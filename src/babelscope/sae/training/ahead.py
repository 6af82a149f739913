"""Two trainings side by side on a CPU, although DVC runs one stage after the other.

A training step of a small SAE takes only 1.5 times as long with one thread as with two. Two trainings side by side,
with one thread each, are therefore faster than two in sequence with two threads each. The stage of one hookpoint trains
the next one in a second process, which leaves its result in that stage's scratch folder; the stage of that hookpoint
then only copies the files.
"""

import logging
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from babelscope.config import Config
from babelscope.core import resume, stage

log = logging.getLogger(__name__)

# The file that is written last, so that it proves that the others are complete.
FIGURES = "figures.json"
# Weights of the encoder above which a step keeps all cores busy, and a second training takes too much memory (16 bytes
# for each weight of the encoder and of the decoder).
_SMALL = 2**22


@contextmanager
def beside(name: str, hookpoint: str, params: Config, weights: int) -> Iterator[bool]:
    """Train another of `params.hookpoints` in a second process meanwhile, if DVC would run its stage after this one.

    Yields whether another training runs at the same time. The list of hookpoints changes no result.

    Parameters
    ----------
    name, hookpoint: the stage, such as `train`, and its hookpoint.
    weights: number of weights of the encoder.
    """
    suits = weights <= _SMALL and torch.get_num_threads() > 1
    other = _next(name, [one for one in params.hookpoints if one != hookpoint]) if suits else None
    if other is None:
        yield stage.is_ahead()
        return
    quiet = os.environ | {stage.AHEAD: "1", "TQDM_DISABLE": "1"}
    command = [sys.executable, sys.argv[0], other]
    try:
        second = subprocess.Popen(command, env=quiet, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    except OSError as error:  # no memory for another process
        log.debug("%s: nothing is trained at the same time (%s)", name, error)
        yield False
        return
    log.info("%s: %s is trained at the same time", name, other)
    try:
        yield True
        if second.poll() is None:
            log.info("%s: waiting for %s", name, other)
        second.wait()  # if it has failed, the stage of that hookpoint trains again, and shows the error
    finally:
        second.kill()


@contextmanager
def shared_threads(weights: int, paired: bool) -> Iterator[int]:
    """Lower the number of CPU threads to that of one of two trainings, for a small SAE, and yield it.

    The number of threads decides how sums are rounded, so a training that runs alone uses the same number. On two cores
    it uses both, since one and two threads give the same bytes (`tests/test_ahead.py`).

    Parameters
    ----------
    weights: number of weights of the encoder.
    paired: whether another training runs at the same time.
    """
    every = torch.get_num_threads()
    if weights <= _SMALL and (paired or every > 2):
        torch.set_num_threads(max(1, every // 2))
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(every)


def _next(name: str, others: Sequence[str]) -> str | None:
    """The first of the hookpoints that DVC would train, and that is not trained yet; None if there is none."""
    if "DVC_ROOT" not in os.environ or stage.is_ahead() or stage.is_distributed():
        return None
    finished = {path.parent.name.rpartition(".")[0] for path in resume.scratch_root().glob(f"{name}@*/{FIGURES}")}
    waiting = [one for one in others if f"{name}@{one}" not in finished]
    try:
        from dvc.repo import Repo

        with Repo(str(Path.cwd())) as repo:
            changed = repo.status(targets=[f"{name}@{one}" for one in waiting]) if waiting else {}
    except Exception as error:  # DVC is locked, or its internals have changed
        log.debug("%s: nothing is trained at the same time (%s)", name, error)
        return None
    return next((one for one in waiting if f"{name}@{one}" in changed), None)
