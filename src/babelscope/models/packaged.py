"""Model files inside installed Python packages: whole, or cut into parts. No code of a package is run.

A package index limits the size of a file, so a large model may come in several packages: `model.gguf.part00` in one,
`model.gguf.part01` in the next. The package that params.yaml names requires the others.
"""

import hashlib
import importlib.metadata
import re
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement

from babelscope.core.errors import UserError, nearest


def find(package: str, file: str | None) -> list[Path]:
    """Where `file` (or config.json) is: one path, or those of its parts in their order.

    Parts are named `<file>.part<number>` and lie in the package itself or in those that it requires.

    Raises
    ------
    UserError: no such package, no such file in it, or a part is missing.
    """
    wanted = file or "config.json"
    own = _files(package)
    if own is None:
        raise UserError(
            f"params.yaml: model.name: no installed package {package!r}; install it, or set model.source to "
            "'huggingface' for a folder or a hub id"
        )
    whole = [path for path in own if path.name == wanted]
    if whole:
        return whole[:1]
    form = re.compile(re.escape(wanted) + r"\.part(\d+)")
    required = [path for name in _required(package) for path in _files(name) or []]
    found = [(int(match[1]), path) for path in [*own, *required] if (match := form.fullmatch(path.name))]
    parts = dict(found)
    if not parts:
        have = [path.name for path in own if path.suffix == (".gguf" if file else ".json")]
        raise UserError(
            f"params.yaml: model.gguf_file: package {package!r} holds no {wanted!r}; {nearest(wanted, have)}"
        )
    lacking = sorted(set(range(min(1, *parts), max(parts) + 1)) - set(parts))
    twice = next((number for number in parts if [n for n, _ in found].count(number) > 1), None)
    if lacking or twice is not None:
        what = f"part {lacking[0]} is missing" if lacking else f"part {twice} is there twice"
        raise UserError(
            f"params.yaml: model.name: {package!r} holds {wanted!r} in parts, and {what}; {_advice(package)}"
        )
    return [parts[number] for number in sorted(parts)]


def _advice(package: str) -> str:
    absent = [name for name in _required(package) if _files(name) is None]
    return f"install {', '.join(absent)}" if absent else "install the package again"


def join(parts: list[Path], package: str, sha256: str | None, target: Path) -> None:
    """Write the parts that `package` and those it requires hold one behind the other, and check the SHA-256.

    Raises
    ------
    UserError: the content is not the one that `sha256` names; `target` is removed.
    """
    digest = hashlib.sha256()
    with target.open("wb") as out:
        for block in _blocks(parts):
            digest.update(block)
            out.write(block)
    if sha256 not in (None, digest.hexdigest()):
        target.unlink()
        raise _other_content(parts[0], digest.hexdigest(), sha256, _advice(package))


def check(path: Path, sha256: str) -> None:
    """Compare the SHA-256 of a file with what params.yaml says.

    Raises
    ------
    UserError: it is another one.
    """
    digest = hashlib.sha256()
    for block in _blocks([path]):
        digest.update(block)
    if digest.hexdigest() != sha256:
        raise _other_content(path, digest.hexdigest(), sha256, "put the right file there")


def _other_content(path: Path, found: str, sha256: str | None, advice: str) -> UserError:
    return UserError(
        f"params.yaml: model.sha256: {path.name} has the SHA-256 {found}, expected {sha256}; "
        f"{advice}, or correct the checksum"
    )


def _blocks(paths: list[Path]) -> Iterator[bytes]:
    for path in paths:
        with path.open("rb") as handle:
            while block := handle.read(2**22):
                yield block


def _files(package: str) -> list[Path] | None:
    """The files of an installed package; null where it is not installed."""
    try:
        return [Path(str(file.locate())) for file in importlib.metadata.distribution(package).files or []]
    except importlib.metadata.PackageNotFoundError:
        return None


def _required(package: str) -> list[str]:
    """The packages that `package` requires on this machine, extras aside."""
    lines = importlib.metadata.distribution(package).requires or []
    needed = [Requirement(line) for line in lines]
    return [one.name for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]
