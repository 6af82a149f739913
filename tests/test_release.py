"""What a release consists of: one version, a changelog in the form of Keep a Changelog, workflows that can run."""

import re
import tomllib

import pytest
from closure import ROOT

from babelscope import config

WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


def test_one_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert config.read_yaml(ROOT / "CITATION.cff")["version"] == version
    assert version in (ROOT / "CHANGELOG.md").read_text()


def test_the_changelog_keeps_its_form() -> None:
    lines = (ROOT / "CHANGELOG.md").read_text().splitlines()
    heads = [line for line in lines if line.startswith("#")]
    assert heads[:2] == ["# Changelog", "## [Unreleased]"]
    kinds = "Added|Changed|Deprecated|Removed|Fixed|Security"
    form = rf"## \[Unreleased\]|## \[\d+\.\d+\.\d+\] - \d{{4}}-\d\d-\d\d|### ({kinds})"
    assert [line for line in heads[1:] if not re.fullmatch(form, line)] == []


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_runs_what_the_repository_has(path) -> None:  # type: ignore[no-untyped-def]
    workflow = config.read_yaml(path)
    makefile = (ROOT / "Makefile").read_text()
    commands = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    assert workflow["on"] and commands or "deploy" in workflow["jobs"]
    for command in commands:
        if command.startswith("make "):
            assert re.search(rf"(?m)^{command.split()[1]}:", makefile), command
        if command.startswith(".ci/"):
            assert (ROOT / command).is_file()


def test_the_lock_file_has_every_pinned_package_with_hashes_and_names_no_host() -> None:
    def pins(text: str) -> dict[str, str]:
        found = re.findall(r"(?m)^([\w.-]+)==([^\s;]+)", text)
        return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found}

    lock = (ROOT / "requirements.lock").read_text()
    pinned = pins((ROOT / "requirements.txt").read_text()) | pins((ROOT / "requirements-data.txt").read_text())
    assert pinned.items() <= pins(lock).items(), "make lock"
    assert "//" not in lock
    for package in re.split(r"\n(?=\S)", lock.strip()):
        assert re.fullmatch(r"[^\n]+ \\(\n    --hash=sha256:[0-9a-f]{64}( \\)?)+", package), package[:80]
