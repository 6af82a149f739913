"""What makes DVC run a stage again: in a copy of the repository whose stages write a hash of what they depend on.

test_end_to_end.py asks the same of the real stages, once.
"""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from clone import SMALL, clone, dvc, ran, set_params
from closure import ROOT

from babelscope import config
from babelscope.core.fingerprint import NO_DEPENDENCIES

WRITE = """import hashlib, json, pathlib, sys
from babelscope import config

outs, deps, keys = map(json.loads, sys.argv[1:])
params = config.read_yaml(pathlib.Path("params.yaml"))

def value(key):
    found = params
    for part in key.split("."):
        found = found[part]
    return found

state = hashlib.md5(json.dumps([[key, value(key)] for key in keys]).encode())
for dep in map(pathlib.Path, deps):
    for path in sorted(path for path in [dep, *dep.rglob("*")] if path.is_file() and path.name != ".gitignore"):
        state.update(str(path).encode() + path.read_bytes())
if "data/activations" in outs:  # `train` and others depend on what is inside
    outs += [f"data/activations/{name}/x.csv" for name in params["hookpoints"]] + ["data/activations/tokens.parquet"]
for path in map(pathlib.Path, outs):
    path = path if path.suffix in (".json", ".parquet") else path / "x.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(state.hexdigest())
"""
NEW = "layers.29.mlp"
# What `score` computes is not the same, so these compute again.
AFTER_SCORE = ["stability", "switching", "identify", "ablate", "baselines", "script", "steer", "browse", "explain",
               "report", "track"]  # fmt: skip


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The state after `dvc repro`, which is committed."""
    folder = tmp_path_factory.mktemp("clone")
    clone(folder)
    (folder / "write.py").write_text(WRITE)
    pipeline = config.read_yaml(folder / "dvc.yaml")
    for name, stage in pipeline["stages"].items():
        listed = [out for key in ("outs", "metrics", "plots") for out in stage.get(key, [])]
        outs = [next(iter(out)) if isinstance(out, dict) else out for out in listed]
        deps = [dep for dep in stage.get("deps", []) if dep.startswith(("data/", "metrics/"))]
        # Activations of a hookpoint are the same beside those of others, and stored activations leave `stream` nothing.
        keys = [key for key in stage.get("params", []) if key != "hookpoints" or name not in ("extract", "stream")]
        if name != "prune":
            stage["cmd"] = shlex.join(["python", "write.py", *map(json.dumps, (outs, deps, keys))])
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": pipeline["stages"]}, sort_keys=False))
    (folder / "data/dictionaries").mkdir()  # `prune` makes it, for a matrix without items
    dvc(folder, "repro")
    subprocess.run(["git", "add", "-A"], cwd=folder, check=True)
    subprocess.run(["git", "commit", "-qm", "state"], cwd=folder, check=True)
    return folder


def changed(repo: Path) -> set[str]:
    """The stages that `dvc status` names, but for `track`, which is always changed."""
    return set(re.findall(r"^(\w+)(?:@\S+)?:$", dvc(repo, "status"), re.MULTILINE)) - {"track"}


def test_nothing_is_changed_after_a_run(repo: Path) -> None:
    assert changed(repo) == set()


@pytest.mark.parametrize("package", NO_DEPENDENCIES)
def test_another_message_in_a_package_that_computes_nothing_runs_no_stage(repo: Path, package: str) -> None:
    edited = 0
    for path in sorted((repo / "src/babelscope" / package).rglob("*.py")):
        text = path.read_text()
        new = re.sub(r'(?m)^(\s+(?:raise|log\.\w+|return|lines).*f?")', r"\1Another word: ", text)
        edited += new != text
        path.write_text(new)
    assert edited > 1
    # The pages are `report`'s own output.
    assert changed(repo) <= ({"report"} if package == "report" else set())
    subprocess.run(["git", "checkout", "-q", "--", f"src/babelscope/{package}"], cwd=repo, check=True)


def test_a_language_that_trains_no_sae_repeats_nothing_for_those_that_do(repo: Path) -> None:
    languages = SMALL["languages"]
    set_params(repo, {"languages": [*languages, "fi"], "corpus.train_languages": languages})
    again = changed(repo)
    assert {"sample", "extend", "score"} <= again and not again & {
        "extract",
        "train",
        "retrain",
        "encode",
        "dictionary",
    }
    subprocess.run(["git", "checkout", "-q", "--", "params.yaml"], cwd=repo, check=True)


def test_a_new_hookpoint_trains_one_sae_and_runs_what_compares_hookpoints(repo: Path) -> None:
    set_params(repo, {"hookpoints": [*SMALL["hookpoints"], NEW]})
    compare = ["prune", "extend", "quality", "score", "sharing", *AFTER_SCORE]
    assert sorted(ran(dvc(repo, "repro"))) == sorted(["extract", "stream", f"train@{NEW}", f"encode@{NEW}", *compare])
    set_params(repo, {"hookpoints": SMALL["hookpoints"]})
    assert ran(dvc(repo, "repro")) == ["prune", "track"]
    assert changed(repo) == set()


def test_code_that_computes_runs_what_depends_on_it(repo: Path) -> None:
    (repo / "src/babelscope/steering/new.py").write_text("")
    assert changed(repo) == {"steer"}
    (repo / "src/babelscope/steering/new.py").unlink()
    assert (ROOT / "src/babelscope/steering").is_dir()
