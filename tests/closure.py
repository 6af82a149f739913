"""Which files of this repository a script imports, directly or not, also inside functions."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
SRC = ROOT / "src"


def _files(module: str) -> set[Path]:
    """The files behind a dotted name: the module and the `__init__.py` of every package above it."""
    found: set[Path] = set()
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        base = SRC.joinpath(*parts[:end])
        for path in (base / "__init__.py", base.with_suffix(".py")):
            if path.is_file():
                found.add(path)
    return found


def _imports(path: Path) -> set[Path]:
    found: set[Path] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found |= _files(alias.name)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                found |= _files(f"{node.module}.{alias.name}")
    return found


def closure(script: Path) -> set[str]:
    """Paths, relative to the root, of `script` and of everything in `src/` that running it may import."""
    seen: set[Path] = set()
    todo = {script}
    while todo:
        path = todo.pop()
        seen.add(path)
        todo |= _imports(path) - seen
    return {str(path.relative_to(ROOT)) for path in seen}
