"""`python -m babelscope.verify`: re-hash the DVC cache, since DVC trusts a cached file by its name alone."""

import hashlib
import logging
import os
from pathlib import Path

from babelscope import stage
from babelscope.errors import UserError

log = logging.getLogger(__name__)


def corrupt(cache: Path) -> tuple[list[Path], int]:
    """The files under `cache` (`<2 hex>/<30 hex>[.dir]`) whose content has another MD5, and the count of all."""
    files = sorted(path for path in cache.glob("[0-9a-f][0-9a-f]/*") if path.is_file())
    return [path for path in files if _md5(path) != path.parent.name + path.name.removesuffix(".dir")], len(files)


def _md5(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "md5").hexdigest()


def main() -> None:
    """Print what is corrupt; `UserError` if anything is."""
    cache = Path(os.environ.get("DVC_ROOT", ".")) / ".dvc/cache/files/md5"
    bad, total = corrupt(cache)
    if bad:
        names = "\n       ".join(map(str, bad))
        raise UserError(
            f"{len(bad)} of {total} cached files are corrupt; delete them and run `dvc repro`:\n       {names}"
        )
    log.info("verify: %d cached files, all as their names say", total)


if __name__ == "__main__":
    stage.run(main)
