"""The command `babelscope`, and the names that `import babelscope` offers."""

import importlib
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from closure import ROOT

import babelscope
from babelscope import cli, config
from babelscope.core.errors import UserError
from babelscope.sae import directory


def call(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-m", "babelscope", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("arguments", "module", "given"),
    [
        (["verify"], "tracking.verify", ()),
        (["export", "out"], "sae.export", (Path("out"), [])),
        (["export", "out", "layers.1.mlp", "layers.2"], "sae.export", (Path("out"), ["layers.1.mlp", "layers.2"])),
        (["delphi", "out", "layers.2"], "explain.delphi", (Path("out"), ["layers.2"])),
        (["ui"], "tracking.ui", ()),
    ],
)
def test_a_command_calls_its_package(
    arguments: list[str], module: str, given: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[object, ...]] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.import_module(f"babelscope.{module}"), "main", lambda *given: calls.append(given))
    cli.main(arguments)
    assert calls == [given]


def test_params_are_checked_by_one_message(tmp_path: Path) -> None:
    text = (ROOT / "params.yaml").read_text()
    (tmp_path / "params.yaml").write_text(text)
    done = call(tmp_path, "params", "check")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    (tmp_path / "params.yaml").write_text(text.replace("  ratio:", "  ratoi:"))
    done = call(tmp_path, "params", "check")
    assert done.returncode == 1 and "params.yaml: score.ratoi: unknown key; allowed" in done.stderr
    assert done.stderr.startswith("error: params.yaml: score.ratio: the key is missing\n")


def test_names_of_saelens_directory_are_checked_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = config.read_yaml(ROOT / "params.yaml") | {"hookpoints": ["layers.2", "layers.3"]}
    content["train"] |= {"source": "pretrained"}
    content["pretrained"] |= {"name": "sae-lens:release", "folder": "layer_{layer}"}
    content["stability"] |= {"hookpoints": []}
    (tmp_path / "params.yaml").write_text(json.dumps(content))
    monkeypatch.chdir(tmp_path)
    saes = [{"id": "layer_2", "path": "layer_2.sae.pt"}]
    release = {"conversion_func": "qwen_scope", "repo_id": "x/y-L0_9", "saes": saes}
    monkeypatch.setattr(directory, "read", lambda: {"release": release})
    with pytest.raises(UserError, match="sae-lens:release: the release has no SAE 'layer_3'; allowed: layer_2"):
        cli.params_check()
    saes.append({"id": "layer_3", "path": "layer_3.sae.pt"})
    cli.params_check()


def test_a_wrong_command_is_refused_with_those_that_there_are(tmp_path: Path) -> None:
    done = call(tmp_path, "exprot")
    assert done.returncode == 2 and "verify" in done.stderr
    for command in ("verify", "export", "delphi", "ui", "params"):
        assert command in call(tmp_path, "--help").stdout


def test_the_command_is_installed_with_the_package() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, function = scripts["babelscope"].partition(":")
    assert getattr(importlib.import_module(module), function) is cli.main


def test_the_names_of_the_readme_are_offered_without_importing_torch() -> None:
    code = "import sys, babelscope; assert not {'torch', 'polars'} & set(sys.modules); print(dir(babelscope))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for name in babelscope.__all__:
        assert getattr(babelscope, name).__name__ == name and repr(name) in done.stdout
    with pytest.raises(AttributeError, match="module 'babelscope' has no attribute 'sacn'"):
        babelscope.sacn  # noqa: B018
