"""`babelscope verify`: re-hash the outputs and the DVC cache.

DVC trusts a cached file by its name, and an output by its size and date: it does not notice a flipped bit.
"""

import json
import logging
import os
from pathlib import Path

from babelscope import config
from babelscope.core.errors import UserError
from babelscope.core.fingerprint import content_md5
from babelscope.tracking import state

log = logging.getLogger(__name__)

CACHE = Path(".dvc/cache/files/md5")


def corrupt(cache: Path) -> tuple[list[Path], int]:
    """The files under `cache` (`<2 hex>/<30 hex>[.dir]`) whose content has another MD5, and the count of all."""
    files = sorted(path for path in cache.glob("[0-9a-f][0-9a-f]/*") if path.is_file())
    bad = [path for path in files if content_md5(path) != path.parent.name + path.name.removesuffix(".dir")]
    return bad, len(files)


def changed(root: Path) -> tuple[list[Path], int]:
    """The files that differ from the outputs in dvc.lock, by path below `root`, and the number of outputs.

    Missing files count. If the list of a folder's files is not in the cache, the folder itself is named.

    Raises
    ------
    UserError: dvc.yaml, dvc.lock or params.yaml is missing or is not YAML.
    """
    outputs = state.read(root, config.read_yaml(root / "params.yaml"), without="").outputs
    return [path for out, md5 in outputs.items() for path in _changed(root, Path(out), md5)], len(outputs)


def _changed(root: Path, out: Path, md5: str) -> list[Path]:
    if (root / out).exists() and content_md5(root / out) == md5:
        return []
    listing = root / CACHE / md5[:2] / md5[2:]
    if not (root / out).exists() or not md5.endswith(".dir") or not listing.is_file():
        return [out]
    expected = {out / entry["relpath"]: entry["md5"] for entry in json.loads(listing.read_bytes())}
    found = {path.relative_to(root) for path in (root / out).rglob("*") if path.is_file() and path.suffix != ".tmp"}
    damaged = [path for path, wanted in expected.items() if path not in found or content_md5(root / path) != wanted]
    return sorted([*damaged, *(found - expected.keys())]) or [out]


def main() -> None:
    """Raise a `UserError` that names the corrupt and changed files, if there are any."""
    root = Path(os.environ.get("DVC_ROOT", "."))
    bad, files = corrupt(root / CACHE)
    other, outputs = changed(root) if (root / "dvc.lock").is_file() else ([], 0)
    lines = []
    if bad:
        lines += [f"{len(bad)} of {files} cached files are corrupt; delete them and run `dvc repro`:", *bad]
    if other:
        lines += ["different from dvc.lock; delete them, then `dvc checkout` (metrics: git) or `dvc repro`:", *other]
    if lines:
        raise UserError("\n       ".join(map(str, lines)))
    log.info("verify: %d cached files and %d outputs, all as they were written", files, outputs)
