"""What README.md and docs/ name is there: modules, parameters, make targets, linked files, stages."""

import importlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from closure import ROOT
from ruamel.yaml import YAML

from babelscope import config

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += [ROOT / "data/README.md", ROOT / "mlruns/README.md"]
PARAMS = YAML(typ="safe").load((ROOT / "params.yaml").read_text(encoding="utf-8"))
STAGES = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", text_of(page)):
        if not link.startswith(("http", "#")):
            assert (page.parent / link.partition("#")[0]).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_modules_and_functions_exist(page: Path) -> None:
    for name in set(re.findall(r"`(babelscope(?:\.\w+)+)`", text_of(page))):
        parent, _, last = name.rpartition(".")
        assert hasattr(importlib.import_module(parent), last) or importlib.import_module(name), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_parameters_exist(page: Path) -> None:
    sections = "|".join(name for name, content in PARAMS.items() if isinstance(content, dict))
    text = re.sub(r"```text.*?```", "", text_of(page), flags=re.DOTALL)  # messages, of keys that there are not
    for section, key in re.findall(rf"(?<![\w./])({sections})\.([a-z_]+)(?![\w./(])", text):
        assert key == "md" or key in PARAMS[section], f"{section}.{key}"  # a page may be called as a section is


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_name_what_there_is(page: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for target in re.findall(r"(?:`|^)make ([a-z]+)", text_of(page), re.MULTILINE):
        assert target in targets, target
    for script in re.findall(r"python ((?:benchmarks|stages|tools)/\w+\.py)", text_of(page)):
        assert (ROOT / script).is_file(), script
    for test in re.findall(r"tests/test_\w+\.py", text_of(page)):
        assert (ROOT / test).is_file(), test


def test_the_folders_of_outputs_are_described() -> None:
    outs = {part for stage in STAGES.values() for out in stage.get("outs", [])
            for part in ([*out] if isinstance(out, dict) else [out])}  # fmt: skip
    names = {path.split("/")[1] for path in outs if path.startswith("data/")}
    table = text_of(ROOT / "data/README.md")
    assert {name for name in names if f"`{name}/`" not in table and f"`{name}`" not in table} == set()


def test_the_architecture_page_has_every_package() -> None:
    rows = re.findall(r"^\| `(\w+)/` \|", text_of(ROOT / "docs/architecture.md"), re.MULTILINE)
    assert sorted(rows) == sorted(path.parent.name for path in (ROOT / "src/babelscope").glob("*/__init__.py"))


def test_a_page_describes_every_stage() -> None:
    rows = set(re.findall(r"^\| `(\w+)` \|", text_of(ROOT / "docs/stages.md"), re.MULTILINE))
    assert rows == set(STAGES)


BLOCKS = [
    (page.name, number, block)
    for page in PAGES
    for number, block in enumerate(re.findall(r"```yaml\n(.*?)```", text_of(page), re.DOTALL))
]


@pytest.mark.parametrize(("page", "number", "block"), BLOCKS, ids=[f"{page}-{number}" for page, number, _ in BLOCKS])
def test_changes_of_params_are_valid(page: str, number: int, block: str, tmp_path: Path) -> None:
    content = {key: dict(value) if isinstance(value, dict) else value for key, value in PARAMS.items()}
    changes = YAML(typ="safe").load(block)
    for key, value in changes.items():
        content[key] = content[key] | value if isinstance(value, dict) else value
    file = tmp_path / "params.yaml"
    YAML().dump(content, file)
    config.load(file)


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_the_set_up_and_the_readme_name_the_terms_of_the_model() -> None:
    shown = subprocess.run(["make", "-n", "-B", "setup"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for text in (shown, (ROOT / "README.md").read_text(encoding="utf-8")):
        assert "you accept the Gemma Terms of Use" in text and "make experiment NAME=smollm2-135m" in text
