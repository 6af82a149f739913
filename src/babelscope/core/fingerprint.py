"""Fingerprints of all that a stage's result depends on, and hashes of files and folders as DVC computes them."""

import hashlib
import importlib.metadata
import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pathspec import GitIgnoreSpec

from babelscope.core.errors import UserError

log = logging.getLogger(__name__)

# Packages that cannot change a result (tests/test_pipeline.py): no stage but `report` and `track` depends on them.
NO_DEPENDENCIES = ("core", "config", "tracking", "report")
# Bytes: hashing a smaller file or folder is faster than importing DVC.
_SMALL = 2**27


def fingerprint(stage: str, params: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """Name the work of a stage: the same stage, params, inputs and code give the same 32 hex digits.

    It names the folder in which an interrupted stage leaves its checkpoints, and the MLflow run that it resumes.

    Parameters
    ----------
    stage: the stage as DVC calls it, e.g. `train@layers.6.mlp`.
    params: the params that the stage depends on; nested mappings and lists are fine.
    inputs: hashes of the files and folders that it reads, by path (see `dvc_md5`).

    Raises
    ------
    TypeError, ValueError: `params` holds something that JSON cannot represent exactly.
    """
    content = {"stage": stage, "params": params, "inputs": dict(inputs), "code": _code()}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def dvc_md5(path: Path) -> str:
    """The hash that DVC writes into dvc.lock for `path`: a file's MD5, or `<md5>.dir` of a folder's listing.

    Empty folders and files that `.dvcignore` excludes do not count. From 128 MB on, files that DVC has hashed are not
    read again while their size and date are the same: activations and SAEs may be terabytes.

    Raises
    ------
    UserError: there is no such file or folder.
    """
    root = next((parent for parent in path.absolute().parents if (parent / ".dvc").is_dir()), None)
    if root is None or not path.exists() or _size(path) < _SMALL:
        return content_md5(path)
    try:
        found = _dvc_hash(root, path)
    except Exception as error:  # DVC's internals or its database have changed
        log.debug("%s: hashed without DVC (%s)", path, error)
        found = None
    return found or content_md5(path)


def _dvc_hash(root: Path, path: Path) -> str:
    """The hash by DVC's own code, which caches hashes of files (by private interfaces, see `dvc_md5`)."""
    from dvc.repo import Repo
    from dvc_data.hashfile.build import build

    with Repo(str(root)) as repo:
        found = build(repo.cache.local, str(path.absolute()), repo.fs, "md5", ignore=repo.dvcignore, dry_run=True)[2]
        return str(found.hash_info.value)


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in ([path] if path.is_file() else _files(path.absolute())))


def texts_md5(path: Path) -> str:
    """The hash of a user's folder, or file: the names and contents of what does not begin with a dot.

    Programs leave files with such names in folders that they show (`.DS_Store`, `.git`).
    """
    if path.is_file():
        return _file_md5(path)
    found = sorted(file.relative_to(path) for file in path.rglob("*") if file.is_file())
    shown = [name for name in found if not any(part.startswith(".") for part in name.parts)]
    listing = [[name.as_posix(), _file_md5(path / name)] for name in shown]
    return hashlib.md5(json.dumps(listing).encode(), usedforsecurity=False).hexdigest()


def content_md5(path: Path) -> str:
    """The same hash as `dvc_md5`, but every file is read.

    Raises
    ------
    UserError: there is no such file or folder.
    """
    if path.is_file():
        return _file_md5(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder; an earlier stage writes it: dvc repro")
    listing = [
        {"md5": _file_md5(file), "relpath": file.relative_to(path.absolute()).as_posix()}
        for file in _files(path.absolute())
    ]
    listing.sort(key=lambda entry: entry["relpath"])
    return hashlib.md5(json.dumps(listing, sort_keys=True).encode(), usedforsecurity=False).hexdigest() + ".dir"


def _code() -> dict[str, str]:
    """Hashes of the packages that stages depend on (dvc.yaml), and the version of torch."""
    source = Path(__file__).parent.parent
    packages = (folder for folder in source.iterdir() if folder.is_dir() and folder.name not in NO_DEPENDENCIES)
    files = sorted(file for package in packages for file in package.rglob("*.py"))
    hashes = {file.relative_to(source).as_posix(): _file_md5(file) for file in files}
    return {**hashes, "torch": importlib.metadata.version("torch")}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Path):
        return value.as_posix()
    raise TypeError(f"{type(value).__name__} cannot be part of a fingerprint: {value!r:.80}")


def _file_md5(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    """The files below `folder` that DVC sees."""
    root = next((parent for parent in folder.parents if (parent / ".dvc").is_dir()), None)
    ignored = root / ".dvcignore" if root is not None else None
    lines = ignored.read_text(encoding="utf-8").splitlines() if ignored is not None and ignored.is_file() else []
    ignores = GitIgnoreSpec.from_lines(lines).match_file
    for base, _, names in os.walk(folder, followlinks=True):
        yield from (path for name in names if not ignores((path := Path(base, name)).relative_to(root or folder)))
