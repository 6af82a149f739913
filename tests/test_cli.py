"""The command `babelscope`, and the names that `import babelscope` offers."""

import argparse
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

COMMANDS = ("try", "features", "serve", "compare", "push", "export", "ui", "verify", "params", "completion")


def call(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-m", "babelscope", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("arguments", "module", "given"),
    [
        (["verify"], "tracking.verify", ()),
        (["export", "out"], "bridges.sparsify", (Path("out"), [])),
        (["export", "out", "a.1", "a.2", "--format", "lm-eval"], "bridges.lm_eval", (Path("out"), ["a.1", "a.2"])),
        *(
            (["export", "o", "--format", name], f"bridges.{name.replace('-', '_')}", (Path("o"), []))
            for name in cli.FORMATS
        ),
        (["ui"], "tracking.ui", ()),
        (["try", "Bir cümle"], "playground.sentence", ("Bir cümle", None)),
        (["try", "Bir", "--html", "a.html"], "playground.sentence", ("Bir", Path("a.html"))),
        (["features", "tr", "--number", "3"], "playground.listing", ("tr", 3)),
        (["compare", "a", "b"], "compare.command", ("a", "b", [], 0.7, Path("reports/compare.html"))),
        (
            ["compare", "a", "b", "--hookpoint", "x", "--hookpoint", "y", "--cosine", "0.9", "--html", "c.html"],
            "compare.command",
            ("a", "b", ["x", "y"], 0.9, Path("c.html")),
        ),
        (["push", "me/x"], "release.push", ("me/x", [], False, None, None)),
        (["serve"], "playground.server", ("127.0.0.1", 8000)),
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
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "params.yaml is valid\n")
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
    content["steer"] |= {"hookpoints": []}
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
    shown = call(tmp_path, "--help").stdout
    for command in COMMANDS:
        assert command in shown


def test_every_command_has_a_description_and_stands_on_its_page() -> None:
    [commands] = [one for one in cli.parser()._actions if isinstance(one, argparse._SubParsersAction)]
    assert set(commands.choices) == set(COMMANDS)
    page = (ROOT / "docs/cli.md").read_text(encoding="utf-8")
    for name, command in commands.choices.items():
        assert f"`{name}" in page or f"babelscope {name}" in page, name
        for action in command._actions:
            assert action.help, f"{name}: {action.dest}"


def test_a_page_is_served_where_the_options_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import uvicorn

    from babelscope.playground import server

    asked: list[tuple[object, ...]] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(server, "Reader", lambda *_: "reader")
    monkeypatch.setattr(server, "application", lambda reader, _paths, host: (reader, host))
    monkeypatch.setattr(server.config, "load", lambda: None)
    monkeypatch.setattr(uvicorn, "run", lambda app, host, port, **_: asked.append((app, host, port)))
    cli.main(["serve"])
    cli.main(["serve", "--port", "8001"])
    assert asked == [(("reader", "127.0.0.1"), "127.0.0.1", port) for port in (8000, 8001)]
    assert capsys.readouterr().out.splitlines()[1] == "http://127.0.0.1:8001/ (Ctrl-C ends it)"


def test_the_shells_complete_every_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for shell in ("bash", "zsh", "tcsh"):
        cli.main(["completion", shell])
        script = capsys.readouterr().out
        assert all(command in script for command in COMMANDS)
        if shell == "bash":
            (tmp_path / "completion").write_text(script)
    asked = "source completion; COMP_WORDS=(babelscope com); COMP_CWORD=1; COMP_LINE='babelscope com'; COMP_POINT=14; "
    asked += "_shtab_babelscope babelscope com babelscope; printf '%s\\n' \"${COMPREPLY[@]}\""
    done = subprocess.run(["bash", "-c", asked], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["compare", "completion"]


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
