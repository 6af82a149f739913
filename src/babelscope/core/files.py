"""Writes outputs so that a half-written file is never read, and reads them back."""

import errno
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from babelscope.core.errors import UserError

if TYPE_CHECKING:  # not every stage needs Polars
    import polars as pl

# The only way to read the umask is to set it.
_UMASK = os.umask(0)
os.umask(_UMASK)

# Parts of error messages (of the system, the last one of torch), and the reason that users are told.
_REFUSALS = {
    "No space left on device": "no space left on the disk",
    "Disk quota exceeded": "the disk quota is used up",
    "File too large": "the file is larger than the file system allows",
    "Read-only file system": "the file system is read-only",
    "Permission denied": "no permission to write",
    "Input/output error": "the disk failed",
    "inline_container": "it could not be written to the end (is the disk full?)",
}


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary)` and move the result to `path`: other processes see the old file or the complete new one.

    The folder of `path` is made if it is missing. The temporary file is in that folder, so that the move is a rename.

    Raises
    ------
    UserError: the disk is full or cannot be written to. Nothing of the new file is left.
    """
    # Two threads may write the same file, such as the answer to one question that was asked twice.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_native_id()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        temporary.chmod(0o666 & ~_UMASK)  # some writers leave files that only the owner can read
        with temporary.open("r+b") as handle:
            os.fsync(handle.fileno())
        temporary.replace(path)
    except Exception as error:
        # Libraries raise their own exceptions, which contain the system's message.
        reason = next((ours for theirs, ours in _REFUSALS.items() if theirs in str(error)), None)
        if reason is None:
            raise
        raise UserError(f"{path}: {reason}. Correct this, then run `dvc repro`, which resumes") from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def move(source: Path, target: Path) -> None:
    """Move a file, also to another file system: data/ may be a mount or a link to a larger disk.

    The folder of `target` is made if it is missing. A copy is atomic (`write_atomically`).

    Raises
    ------
    UserError: the disk is full or cannot be written to; `source` is kept.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        source.replace(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        copy_file(source, target)
        source.unlink()


def copy_file(source: Path, target: Path) -> None:
    """Copy a file that an earlier stage has written, atomically.

    Raises
    ------
    UserError: the file is missing, or the copy cannot be written.
    """
    if not source.is_file():
        raise _unreadable(source, FileNotFoundError())
    write_atomically(target, lambda temporary: shutil.copyfile(source, temporary))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` as JSON with sorted keys and a closing newline (the same content gives the same bytes)."""
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(path, lambda p: p.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises
    ------
    UserError: the file is missing, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _unreadable(path, error) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def check_parquet(path: Path | str) -> None:
    """Read a whole Parquet file, batch by batch, with pyarrow, which checks the file's metadata.

    Polars does not: for a page header with a negative number of values it allocates 2 EiB, and the process aborts.

    Raises
    ------
    FileNotFoundError: there is no such file.
    ValueError: it is damaged.
    """
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            for _ in file.iter_batches():
                pass
    except FileNotFoundError:
        raise
    except (OSError, pa.ArrowException) as error:
        raise ValueError(str(error)) from None


@contextmanager
def _reading(path: Path | str) -> Iterator[None]:
    """Turn what pyarrow and Polars raise into a `UserError`."""
    import polars as pl
    import pyarrow as pa

    try:
        yield
    except (OSError, ValueError, pa.ArrowException, pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise _unreadable(path, error) from None


def read_table(path: Path | str, columns: Sequence[str] | None = None) -> "pl.DataFrame":
    """Read a Parquet file that an earlier stage has written, or some of its columns.

    Raises
    ------
    UserError: the file is missing, damaged, or lacks a column.
    """
    import polars as pl
    from pyarrow import parquet

    with _reading(path):
        with parquet.ParquetFile(path) as file:
            table = file.read(columns=None if columns is None else list(columns))
        table.validate(full=True)  # Polars does not check offsets and UTF-8
        frame = pl.DataFrame(table)
        return frame if columns is None else frame.select(columns)


def scan_table(path: Path | str) -> "pl.LazyFrame":
    """A lazy frame of a Parquet file that an earlier stage has written.

    Raises
    ------
    UserError: the file is missing or damaged.
    """
    import polars as pl

    with _reading(path):
        check_parquet(path)
        pl.read_parquet_schema(path)
    return pl.scan_parquet(path, glob=False)


def _unreadable(path: Path | str, error: BaseException) -> UserError:
    if isinstance(error, FileNotFoundError):
        return UserError(f"{path}: no such file; an earlier stage writes it: dvc repro")
    reason = str(error).splitlines()[0].removeprefix("parquet: File out of specification: ")
    return UserError(f"{path}: damaged or not readable ({reason}); remove it, then run `dvc checkout` or `dvc repro`")
