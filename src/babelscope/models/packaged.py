"""Model files inside installed Python packages, whole or in parts. No code of a package is run.

Package indexes limit the size of a file, so a large model may be split over several packages: `model.gguf.part00` in
one, `model.gguf.part01` in the next. The package named in params.yaml requires the others.
"""

import hashlib
import importlib.metadata
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from packaging.requirements import Requirement

from babelscope.core.errors import UserError, nearest


def find(package: str, file: str | None) -> list[Path]:
    """The path of `file` (or of config.json), or the paths of its parts in order.

    Parts are named `<file>.part<number>` and are in the package or in the packages that it requires.

    Raises
    ------
    UserError: the package is not installed or lacks the file, or a part is missing.
    """
    wanted = file or "config.json"
    files = files_of(package)
    if files is None:
        raise UserError(
            f"params.yaml: model.name: no installed package {package!r}; install it, or set model.source to "
            "'huggingface' for a folder or a hub id"
        )
    whole = [path for path in files if path.name == wanted]
    if whole:
        return whole[:1]
    form = re.compile(re.escape(wanted) + r"\.part(\d+)")
    required = [path for name in _required(package) for path in files_of(name) or []]
    found = sorted((int(match[1]), path) for path in [*files, *required] if (match := form.fullmatch(path.name)))
    if not found:
        have = [path.name for path in files if path.suffix == (".gguf" if file else ".json")]
        raise UserError(
            f"params.yaml: model.gguf_file: package {package!r} holds no {wanted!r}; {nearest(wanted, have)}"
        )
    numbers = [number for number, _ in found]
    for number in range(min(1, numbers[0]), numbers[-1] + 1):
        if numbers.count(number) != 1:
            what = f"part {number} {'occurs twice' if number in numbers else 'is missing'}"
            raise UserError(
                f"params.yaml: model.name: {package!r} holds {wanted!r} in parts, and {what}; {_advice(package)}"
            )
    return [path for _, path in found]


def _advice(package: str) -> str:
    absent = [name for name in _required(package) if files_of(name) is None]
    return f"install {', '.join(absent)}" if absent else "install the package again"


def join(parts: Sequence[Path], package: str, sha256: str | None, target: Path) -> None:
    """Join the parts to `target`; if its SHA-256 differs, remove it and raise a `UserError`."""
    with target.open("wb") as out:
        for part in parts:
            with part.open("rb") as handle:
                shutil.copyfileobj(handle, out)
    if sha256 is not None:
        try:
            check(target, sha256, parts[0].name, _advice(package))
        except UserError:
            target.unlink()
            raise


def check(path: Path, sha256: str, name: str | None = None, advice: str = "replace the file") -> None:
    """Raise a `UserError` (in which the file is called `name`) unless it has the SHA-256 given in params.yaml."""
    with path.open("rb") as handle:
        found = hashlib.file_digest(handle, "sha256").hexdigest()
    if found != sha256:
        raise UserError(
            f"params.yaml: model.sha256: {name or path.name} has the SHA-256 {found}, expected {sha256}; "
            f"{advice}, or correct the checksum"
        )


def files_of(package: str) -> list[Path] | None:
    """The files of an installed package; None if it is not installed."""
    try:
        return [Path(str(file.locate())) for file in importlib.metadata.files(package) or []]
    except (importlib.metadata.PackageNotFoundError, ValueError):  # the latter: an empty name
        return None


def _required(package: str) -> list[str]:
    """The packages that `package` requires here, without extras."""
    needed = map(Requirement, importlib.metadata.distribution(package).requires or [])
    return [one.name for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]
