"""What makes DVC run a stage again: in a copy of the repository whose stages only write a word into their outputs."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml
from clone import SMALL, clone, run, set_params
from closure import ROOT

from babelscope import config
from babelscope.core.fingerprint import NO_DEPENDENCIES

WRITE = """import sys, pathlib
for name in sys.argv[1:]:
    path = pathlib.Path(name)
    path = path if path.suffix in (".json", ".parquet") else path / "x.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("word")
"""


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The state after `dvc repro`."""
    folder = tmp_path_factory.mktemp("clone")
    clone(folder)
    (folder / "write.py").write_text(WRITE)
    pipeline = config.read_yaml(folder / "dvc.yaml")
    for stage in pipeline["stages"].values():
        listed = [out for key in ("outs", "metrics", "plots") for out in stage.get(key, [])]
        outs = [next(iter(out)) if isinstance(out, dict) else out for out in listed]
        # `train` and others depend on folders and files inside the output of `extract`.
        if "data/activations" in outs:
            outs += [f"data/activations/{name}/x.csv" for name in SMALL["hookpoints"]]
            outs += ["data/activations/tokens.parquet"]
        stage["cmd"] = f"python write.py {' '.join(outs)}"
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": pipeline["stages"]}, sort_keys=False))
    (folder / "data/dictionaries").mkdir()  # `prune` makes it, for a matrix without items
    run(folder, "dvc", "repro")
    return folder


def changed(repo: Path) -> set[str]:
    """The stages that `dvc status` names, but for `track`, which is always changed."""
    return set(re.findall(r"^(\w+)(?:@\S+)?:$", run(repo, "dvc", "status"), re.MULTILINE)) - {"track"}


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
    ran = changed(repo)
    assert {"sample", "extend", "score"} <= ran and not ran & {"extract", "train", "retrain", "encode", "dictionary"}
    subprocess.run(["git", "checkout", "-q", "--", "params.yaml"], cwd=repo, check=True)


def test_code_that_computes_runs_what_depends_on_it(repo: Path) -> None:
    (repo / "src/babelscope/steering/new.py").write_text("")
    assert changed(repo) == {"steer"}
    (repo / "src/babelscope/steering/new.py").unlink()
    assert (ROOT / "src/babelscope/steering").is_dir()
