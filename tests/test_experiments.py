"""experiments/: every file changes params.yaml to valid params, and `make experiment` does it without a loss."""

import shutil
import subprocess
import sys

import pytest
import yaml
from closure import ROOT
from params_texts import CONTENTS, OVERLAYS, TEXTS

from babelscope import config
from babelscope.config import overlay
from babelscope.config.loading import YamlLoader
from babelscope.core.errors import UserError
from babelscope.models.hookpoints import layer_of

# Blocks of the model that each asks for (of its config.json).
BLOCKS = {"llama-3.2-1b": 16, "gemma-2-2b": 26, "pythia-160m": 12, "qwen3-0.6b": 28, "smollm2-135m": 30,
          "gemma-3-270m-scope-2": 18, "gemma-3-1b-scope-2": 26, "qwen3-1.7b-scope": 28}  # fmt: skip
SMALL = """\
# All settings.
languages:
- en
- de
hookpoints: [layers.1]  # Which modules.
model:
  # Where it is from.
  source: package
  path:  # A folder, or null.
  name: a
# The last.
seed: 0  # Of everything.
"""


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_experiment_gives_valid_params(name):
    params = config.parse(CONTENTS[name], name)
    names = [*params.hookpoints, *params.neurons.hookpoints]
    assert max(layer_of(name) for name in names) == BLOCKS[name] - 1
    assert set(params.steer.prompt_languages) <= set(params.languages)
    if params.train.source == "pretrained":
        places = [params.pretrained.place_of(name, layer_of(name)) for name in params.hookpoints]
        assert len(set(places)) == len(params.hookpoints) == BLOCKS[name]


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_experiment_holds_only_what_differs_and_applying_it_keeps_every_comment(name):
    base = CONTENTS["params"]
    for key, value in OVERLAYS[name].items():
        pairs = value.items() if isinstance(value, dict) else [(None, value)]
        assert all((base[key] if inner is None else base[key][inner]) != wanted for inner, wanted in pairs), key
    assert yaml.load(TEXTS[name], YamlLoader) == CONTENTS[name]
    before, after = ([line.partition("#")[2] for line in TEXTS[key].splitlines()] for key in ("params", name))
    assert [words for words in before if words] == [words for words in after if words]


@pytest.mark.parametrize(
    ("content", "old", "new"),
    [
        ({"seed": 7}, "seed: 0  #", "seed: 7  #"),
        ({"model": {"path": "no", "source": None}}, "source: package\n  path:  #", "source:\n  path: no  #"),
        ({"model": {"name": "1e-3"}}, "name: a\n", "name: '1e-3'\n"),
        ({"languages": ["no"]}, "- en\n- de\n", "- no\n"),
        ({"languages": []}, "languages:\n- en\n- de\n", "languages: []\n"),
        ({"hookpoints": ["a", "b"]}, "hookpoints: [layers.1]  # Which modules.\n",
         "hookpoints:  # Which modules.\n- a\n- b\n"),
        ({"model": {"name": {"layers.1": "x", "layers.2": "y"}}}, "name: a\n",
         "name:\n    layers.1: x\n    layers.2: y\n"),
        ({"model": {"name": [{"name": "x", "rows": 3}]}}, "name: a\n", "name:\n  - name: x\n    rows: 3\n"),
    ],
)  # fmt: skip
def test_only_the_lines_of_a_value_change(tmp_path, content, old, new):
    assert SMALL.count(old) == 1
    text = overlay.rewritten(SMALL, content, tmp_path)
    assert text == SMALL.replace(old, new)
    assert yaml.load(text, YamlLoader) == overlay.merge(yaml.load(SMALL, YamlLoader), content)


def test_a_key_that_params_yaml_does_not_have_is_named(tmp_path):
    with pytest.raises(UserError, match=r"has no key model\.nmae; allowed: .* \(did you mean 'name'\?\)"):
        overlay.rewritten(SMALL, {"model": {"nmae": 1}}, tmp_path)


def test_the_paper_s_experiment_has_the_paper_s_values():
    params = config.parse(CONTENTS["llama-3.2-1b"])
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
    shutil.copy(ROOT / "params.yaml", tmp_path)
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
    for _ in range(2):  # again, with its values in place and not committed
        done = make(checkout, "llama-3.2-1b")
        assert done.returncode == 0 and "dvc repro" in done.stdout.splitlines(), done.stderr
        assert (checkout / "params.yaml").read_text() == TEXTS["llama-3.2-1b"]
    done = make(checkout, "smollm2-135m")
    assert done.returncode != 0 and "holds the experiment 'llama-3.2-1b', and experiments do not mix" in done.stderr


def test_make_experiment_loses_no_changes_and_names_what_there_is(checkout):
    changed = TEXTS["params"].replace("seed: 0", "seed: 1")
    (checkout / "params.yaml").write_text(changed)
    done = make(checkout, "llama-3.2-1b")
    assert done.returncode != 0 and "params.yaml: its changes are not committed" in done.stderr
    assert (checkout / "params.yaml").read_text() == changed
    done = make(checkout, "llama")
    assert done.returncode != 0 and f"NAME=llama: no such experiment; allowed: {', '.join(OVERLAYS)}" in done.stderr
    (checkout / "experiments/llama-3.2-1b.yaml").write_text("train:\n  latent: 8\n")
    done = make(checkout, "llama-3.2-1b")
    assert done.returncode != 0
    assert "experiments/llama-3.2-1b.yaml in params.yaml: train.latent: unknown key" in done.stderr


def test_a_download_without_git_runs_and_is_told_what_it_lacks(checkout):
    shutil.rmtree(checkout / ".git")
    done = make(checkout, "llama-3.2-1b")
    assert done.returncode != 0 and "this is no git repository; git init and commit first" in done.stderr
    assert (checkout / "params.yaml").read_text() == TEXTS["params"]
    done = subprocess.run(["make", "repro"], cwd=checkout, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "no git repository here" in done.stdout, done.stderr
    called = [line for line in done.stdout.splitlines() if line.startswith("dvc ")]
    assert called == ["dvc config --local core.no_scm true", "dvc repro"]
    subprocess.run(["git", "init", "-q"], cwd=checkout, check=True)
    done = subprocess.run(["make", "repro"], cwd=checkout, capture_output=True, text=True, check=False)
    assert [line for line in done.stdout.splitlines() if line.startswith("dvc ")] == ["dvc repro"]
