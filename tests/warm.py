"""`dvc` with the stages that it runs, and other scripts, in processes forked from one with their packages imported.

A new process takes two to five seconds to import torch, MLflow or Lightning; `dvc repro` starts some thirty. A fork has
the imports, and else what a new process has: arguments, environment, folder, standard streams, an exit code. Of this
package it has nothing before it imports it. Commands that are no Python script run as DVC runs them.

What is about starting, killing or several processes at once asks for real ones (`Repo.start`, `clone.run`).
"""

import atexit
import gc
import json
import logging
import math
import os
import runpy
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

_PACKAGES = [
    "dvc.cli", "dvc.commands.repro", "dvc.repo", "dvc.repo.experiments", "dvc.repo.reproduce", "dvc_data.index",
    "lightning.pytorch", "matplotlib.pyplot", "mlflow", "mlflow.data", "mlflow.store.tracking.sqlalchemy_store",
    "polars", "pyarrow.parquet", "scipy.stats", "sklearn.linear_model", "torch", "torch._dynamo",
    "transformers.modeling_utils", "transformers.models.auto.modeling_auto",
]  # fmt: skip
# Packages read these when they are imported. They are what `core.stage` sets, and tests.
_SETTINGS = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "DVC_NO_ANALYTICS": "1", "GOMP_SPINCOUNT": "10000"}
_SECONDS = 1800


class _Stage:
    """What DVC needs of `subprocess.Popen` to run the command of a stage: here a fork of the DVC process."""

    def __init__(self, command: list[str], cwd: str, env: dict[str, str], **_: Any) -> None:
        words, self.returncode = shlex.split(command[-1]), 0
        env, words = dict(env), words[words[:1] == ["exec"] :]
        if words[:1] == ["env"]:
            words.pop(0)
            while "=" in words[0]:
                key, _, value = words.pop(0).partition("=")
                env[key] = value
        self.process = None
        if words[0] != "python" or not words[1].endswith(".py"):
            self.process = subprocess.Popen(command, cwd=cwd, env=env)
            return
        self.child = os.fork()
        if self.child == 0:
            # The memory of the DVC process is kept as it is, so that no lock or file of it is closed.
            gc.freeze()
            atexit._clear()
            logging.root.handlers.clear()
            logging.root.setLevel(logging.WARNING)
            _run(words[1:], cwd, env)

    def communicate(self) -> None:
        """Wait for the end."""
        if self.process is not None:
            self.returncode = self.process.wait()
        else:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.child, 0)[1])


def _run(arguments: list[str], cwd: str, env: Mapping[str, str]) -> None:
    """Run a Python script, or `dvc`, as the whole of this process, and end it."""
    signal.alarm(_SECONDS)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    script, code = arguments[0], 0
    places = [os.path.abspath(place) for place in env.get("PYTHONPATH", "").split(os.pathsep) if place]
    sys.argv, sys.path = list(arguments), [*places, *(place for place in sys.path if place not in places)]
    if threads := env.get("OMP_NUM_THREADS"):
        sys.modules["torch"].set_num_threads(int(threads))  # a new process reads it when it imports torch
    try:
        if script == "dvc":
            main, run = import_module("dvc.cli").main, import_module("dvc.stage.run")
            run.subprocess = type(sys)("subprocess")
            run.subprocess.Popen, run.subprocess.check_output = _Stage, subprocess.check_output
            code = main(arguments[1:])
        else:
            sys.path.insert(0, str(Path(script).absolute().parent))
            runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
    try:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
    os._exit(code)


def _serve() -> None:
    """Answer each line of the standard input: a command to start by its process, a process by its exit code or null."""
    sys.path.pop(0)
    for name in _PACKAGES:
        import_module(name)
    assert "babelscope" not in sys.modules  # a fork imports that of its own folder
    for line in sys.stdin:
        job = json.loads(line)
        if "ended" in job:
            process, status = os.waitpid(job["ended"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if process else None
        elif (answer := os.fork()) == 0:
            os.setsid()
            for stream, (path, flags) in enumerate(
                [(os.devnull, os.O_RDONLY), (job["out"], os.O_WRONLY | os.O_APPEND)]
            ):
                os.dup2(os.open(path, flags), stream)
            os.dup2(1, 2)
            _run(job["command"], job["cwd"], job["env"])
        sys.stdout.write(f"{json.dumps(answer)}\n")
        sys.stdout.flush()


@cache
def _server() -> subprocess.Popen[str]:
    from babelscope.core import stage

    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | stage._QUIET | _SETTINGS
    pipe = subprocess.PIPE
    server = subprocess.Popen([sys.executable, __file__], env=env, text=True, stdin=pipe, stdout=pipe)
    atexit.register(server.stdin.close)  # which ends it
    return server


def _ask(**job: Any) -> Any:
    server = _server()
    server.stdin.write(json.dumps(job) + "\n")
    server.stdin.flush()
    return json.loads(server.stdout.readline())


class Process:
    """A running `dvc` or Python script, with what is used of `subprocess.Popen`; it leads a process group of its own.

    `command` begins with `dvc` or the script. The process and its children append what they print to the file `out`.
    """

    def __init__(self, command: Iterable[str], cwd: Path, env: Mapping[str, str], out: Path) -> None:
        self.command, self.out = list(command), out
        self.pid: int = _ask(command=self.command, cwd=str(cwd), env=dict(env), out=str(out))
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, or None if it still runs."""
        if self.returncode is None:
            self.returncode = _ask(ended=self.pid)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end; returns the exit code."""
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.command, timeout or 0)
            time.sleep(0.01)
        assert self.returncode is not None
        return self.returncode

    def kill(self) -> None:
        """Kill it, but not its stage."""
        os.kill(self.pid, signal.SIGKILL)


def run(folder: Path, *command: str, env: Mapping[str, str]) -> tuple[int, str]:
    """Run `dvc` or a script in a folder; returns its exit code and what it and its children printed, in order."""
    with tempfile.NamedTemporaryFile() as out:
        return Process(command, folder, env, Path(out.name)).wait(), Path(out.name).read_text()


if __name__ == "__main__":
    _serve()
