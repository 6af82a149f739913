"""Outputs are hard links to DVC's cache (`cache.type`): whoever writes into one in place changes the cache."""

import os
import re
from pathlib import Path

import pytest
from closure import ROOT

from babelscope.core.files import copy_file, move, write_atomically, write_json

# Calls that write a file.
WRITES = re.compile(r"\b(write_(text|bytes|parquet|csv|ndjson)|save_file|copyfile\w*|torch\.save)\b|\.open\(\"[wax]")
# Files that are no outputs: the model that is unpacked in .scratch, the lock's process number, MLflow's memory.
FREE = {"models/packaged.py", "core/stage.py", "tracking/sync.py"}


def test_every_output_is_written_by_the_atomic_functions() -> None:
    """Each of these calls is an argument of `write_atomically`, an import, or makes no file (a buffer or a string)."""
    package, found = ROOT / "src/babelscope", []
    for path in package.rglob("*.py"):
        name = path.relative_to(package).as_posix()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            is_harmless = re.search(r"write_atomically|import |write_csv\(\)|, buffer\)|^\s*def |`", line)
            if WRITES.search(line) and not is_harmless and name not in FREE:
                found.append(f"{name}:{number}: {line.strip()}")
    assert found == []


@pytest.fixture
def linked(tmp_path: Path) -> tuple[Path, Path]:
    """A file in the cache, read-only, and an output that is a hard link to it."""
    cached, output = tmp_path / "cached", tmp_path / "data/output"
    cached.write_text("old")
    cached.chmod(0o444)
    output.parent.mkdir()
    os.link(cached, output)
    return cached, output


@pytest.mark.parametrize("way", ["write_atomically", "write_json", "copy_file", "move"])
def test_a_linked_output_is_replaced_and_the_cache_is_as_it_was(linked: tuple[Path, Path], way: str) -> None:
    cached, output = linked
    (source := output.with_name("source")).write_text("new")
    if way == "write_atomically":
        write_atomically(output, lambda path: path.write_text("new"))
    elif way == "write_json":
        write_json(output, {"new": 1})
    else:
        {"copy_file": copy_file, "move": move}[way](source, output)
    assert "new" in output.read_text() and cached.read_text() == "old"
    assert output.stat().st_ino != cached.stat().st_ino and output.stat().st_nlink == 1
    assert os.access(output, os.W_OK)
