"""experiments/: every file is a whole and valid params.yaml, and `make experiment` puts it in place without a loss."""

import shutil
import subprocess
import sys

import pytest
from closure import ROOT

from babelscope import config
from babelscope.models.hookpoints import layer_of

EXPERIMENTS = sorted((ROOT / "experiments").glob("*.yaml"))
# Blocks of the model that each asks for (of its config.json).
BLOCKS = {"llama-3.2-1b": 16, "gemma-2-2b": 26, "pythia-160m": 12, "qwen3-0.6b": 28, "smollm2-135m": 30}


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_an_experiment_is_a_valid_params_file(path):
    params = config.parse(config.read_yaml(path), path.name)
    names = [*params.hookpoints, *params.neurons.hookpoints]
    assert max(layer_of(name) for name in names) == BLOCKS[path.stem] - 1
    assert set(params.steer.prompt_languages) <= set(params.languages)
    if params.train.source == "pretrained":
        folders = [params.pretrained.folder_of(name, layer_of(name)) for name in params.hookpoints]
        assert len(set(folders)) == len(params.hookpoints) == BLOCKS[path.stem]


def test_the_paper_s_experiment_has_the_paper_s_values():
    params = config.load(ROOT / "experiments" / "llama-3.2-1b.yaml")
    header = (ROOT / "tests" / "figures" / "exact16.csv").read_text().partition("\n")[0]
    assert len(params.languages) == len(header.split(",")) - 5 == 15
    assert params.hookpoints == [f"layers.{number}.mlp" for number in range(16)]
    assert (params.score.example_rate, params.score.token_rate, params.score.ratio) == (0.98, 0.1, 0.5)
    assert (params.ablate.additive_factor, params.identify.also_texts) == (-0.2, 500)
    assert params.ablate.methods == ["additive", "neuron"]


@pytest.fixture
def checkout(tmp_path):
    """A repository with the Makefile and the experiments, and a dvc that says that it was called."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copytree(ROOT / "experiments", tmp_path / "experiments")
    for name in ("requirements.txt", "requirements-data.txt", "pyproject.toml"):
        (tmp_path / name).touch()
    (tmp_path / "params.yaml").write_text("seed: 0\n")
    binaries = tmp_path / ".venv" / "bin"
    binaries.mkdir(parents=True)
    (binaries / "dvc").write_text("#!/bin/sh\necho dvc $@\n")
    (binaries / "dvc").chmod(0o755)
    (binaries / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (binaries / "python").chmod(0o755)
    (binaries / "babelscope").write_text(f'#!/bin/sh\nexec {sys.executable} -m babelscope "$@"\n')
    (binaries / "babelscope").chmod(0o755)
    (tmp_path / "src").symlink_to(ROOT / "src")
    (tmp_path / ".venv" / ".ready").touch()
    author = ["-c", "user.name=a", "-c", "user.email=a@b.example"]
    for command in (["init", "-q"], ["add", "params.yaml"], [*author, "commit", "-qm", "Begin"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    return tmp_path


def make(checkout, name):
    command = ["make", "experiment", f"NAME={name}"]
    return subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)


def test_make_experiment_puts_it_in_place_and_runs_it(checkout):
    wanted = (checkout / "experiments" / "llama-3.2-1b.yaml").read_text()
    for _ in range(2):  # again, with the file in place and not committed
        done = make(checkout, "llama-3.2-1b")
        assert done.returncode == 0 and "dvc repro" in done.stdout.splitlines(), done.stderr
        assert (checkout / "params.yaml").read_text() == wanted


def test_make_experiment_loses_no_changes_and_names_what_there_is(checkout):
    (checkout / "params.yaml").write_text("seed: 1\n")
    done = make(checkout, "llama-3.2-1b")
    assert done.returncode != 0 and "params.yaml: its changes are not committed" in done.stderr
    assert (checkout / "params.yaml").read_text() == "seed: 1\n"
    done = make(checkout, "llama")
    assert (
        done.returncode != 0 and "allowed: gemma-2-2b llama-3.2-1b pythia-160m qwen3-0.6b smollm2-135m" in done.stderr
    )


def test_a_download_without_git_runs_and_is_told_what_it_lacks(checkout):
    shutil.rmtree(checkout / ".git")
    done = make(checkout, "llama-3.2-1b")
    assert done.returncode != 0 and "this is no git repository; git init and commit first" in done.stderr
    assert (checkout / "params.yaml").read_text() == "seed: 0\n"
    shutil.copy(ROOT / "params.yaml", checkout)
    done = subprocess.run(["make", "repro"], cwd=checkout, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "no git repository here" in done.stdout, done.stderr
    called = [line for line in done.stdout.splitlines() if line.startswith("dvc ")]
    assert called == ["dvc config --local core.no_scm true", "dvc repro"]
    subprocess.run(["git", "init", "-q"], cwd=checkout, check=True)
    done = subprocess.run(["make", "repro"], cwd=checkout, capture_output=True, text=True, check=False)
    assert [line for line in done.stdout.splitlines() if line.startswith("dvc ")] == ["dvc repro"]
