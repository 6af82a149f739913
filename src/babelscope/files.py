"""Writing outputs so that nothing half-written is ever read, and reading the small ones back."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

# The only way to read the umask is to set it.
_UMASK = os.umask(0)
os.umask(_UMASK)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary)` and move the result to `path`: other processes see the old file or the whole new one.

    The folder of `path` is made where missing. The temporary file lies beside `path`, so that the move is a rename.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as handle:
            os.fchmod(handle.fileno(), 0o666 & ~_UMASK)  # some writers leave files that only the owner can read
            os.fsync(handle.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` as JSON with sorted keys and a closing newline (the same content gives the same bytes)."""
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(path, lambda p: p.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def scratch(fingerprint: str) -> Path:
    """The folder in which a stage keeps what it needs to resume after a kill; the stage deletes it at its end.

    It is keyed by the fingerprint of the stage's params and inputs, so that a run never resumes another one's work.
    """
    return Path(os.environ.get("DVC_ROOT", ".")) / ".scratch" / fingerprint
