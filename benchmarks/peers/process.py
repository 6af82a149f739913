"""A peer's worker process, as the benchmarks see it."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parent.parent.parent


class Peer:
    """A worker process in a peer's environment, for one of its variants."""

    def __init__(self, name: str, variant: str = "fastest") -> None:
        python = _ROOT / ".bench" / name / "bin" / "python"
        if not python.exists():
            raise SystemExit(f"{python}: no such file; `make bench` makes it")
        self.name = name if variant == "fastest" else f"{name} {variant}"
        self.variant, self.log, self.versions = variant, _ROOT / ".bench" / name / f"{variant}.log", {}
        command = [python, Path(__file__).parent / f"{name}.py"]
        env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
        pipe = subprocess.PIPE
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, env=env, text=True)

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send the worker a request and wait for its answer (`benchmarks/peers/worker.py` lists both)."""
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
            answer = json.loads(next(line for line in self.process.stdout if line.startswith("{")))
        except (BrokenPipeError, StopIteration):
            raise SystemExit(f"{self.name} has failed: {self.log}") from None
        self.versions = answer["versions"]
        return answer

    def close(self) -> None:
        """End the process."""
        self.process.communicate()
