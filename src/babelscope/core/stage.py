"""Running a stage script: logging, quiet libraries, readable errors, one run at a time, the final table."""

import atexit
import errno
import gc
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from filelock import FileLock, Timeout

from babelscope.core import resume, warm
from babelscope.core.errors import UserError
from babelscope.core.redact import redact
from babelscope.core.terminal import aligned

log = logging.getLogger(__name__)

# Set in a process that computes the result of a stage before DVC runs that stage (`sae.training.ahead`).
AHEAD = "BABELSCOPE_AHEAD"

# Read at import: the imports of a stage take seconds, during which DVC may be killed.
_PARENT = os.getppid()

# No tool sends telemetry, and no library prints its own progress bars into a log. A user's own setting wins.
_QUIET = {
    "DVC_NO_ANALYTICS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "DO_NOT_TRACK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    # transformers warns about packed GGUF weights even if it unpacks them.
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "true",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}


class _Redacting(logging.Formatter):
    """Removes credentials from the log messages of all libraries."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def _show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an uncaught exception as Python does, without credentials."""
    sys.stderr.write(redact("".join(traceback.format_exception(kind, error, trace))))


def run(main: Callable[[], None], locked: bool = True) -> None:
    """Run a stage's `main`: log to stderr, print a `UserError` as one message and end with exit code 1.

    `locked`: only one process at a time (see `alone`).
    """
    environment = dict(os.environ)
    for key, value in _QUIET.items():
        os.environ.setdefault(key, value)
    if not sys.stderr.isatty() or os.environ.get("CI"):
        os.environ.setdefault("TQDM_DISABLE", "1")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Redacting("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    sys.excepthook = _show
    for name in ("lightning", "lightning.pytorch", "lightning.fabric", "mlflow", "alembic", "httpx", "matplotlib"):
        logging.getLogger(name).setLevel(logging.WARNING)
    end_with_dvc()
    keep_caches()
    warm.start(environment)
    try:
        with alone() if locked else nullcontext():
            main()
    except BaseException as error:
        message = _in_a_line(error)
        if message is None:
            raise
        print(f"error: {redact(message)}", file=sys.stderr)
        sys.exit(1)


def script(main: Callable[[], None]) -> Callable[[], None]:
    """Decorator of a stage script's `main`: `run` it if its file is the program, do nothing if the file is imported.

    A script imports the package of its stage inside `main`, after params.yaml: that import takes seconds, and a fault
    of params.yaml is shown at once.
    """
    if main.__module__ == "__main__":
        # Importing torch creates a million objects, none of which becomes garbage. Python would look for garbage after
        # every 700 of them (2,000 since Python 3.13); with this number, an import is 0.2 s faster.
        gc.set_threshold(10_000)
        end_with_dvc()
        warm.run_elsewhere()
        run(main)
        if "DVC_ROOT" in os.environ:  # else a profiler or an interpreter may go on after the script
            _end()
    return main


def _end() -> NoReturn:
    """End as Python does, but do not free every object first (0.3 s in a fork with torch): the system does that."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in filter(None, (sys.stdout, sys.stderr)):  # a closed one is None
        stream.flush()
    os._exit(0)


def keep_caches() -> None:
    """Let libraries keep their caches below `.scratch/` if the home folder is read-only or does not exist.

    Models that are in the cache of the home folder are still found there. It must be called before the libraries are
    imported; a user's own settings win.
    """
    base = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    cache = Path(os.path.expandvars(os.environ.get("HF_HOME", f"{base}/huggingface")))
    try:
        cache = cache.expanduser().absolute()
        existing = next(folder for folder in (cache, *cache.parents) if folder.exists())
        if existing.is_dir() and os.access(existing, os.W_OK | os.X_OK):
            return
    except (OSError, RuntimeError):  # a home folder without permission, or a user without one
        log.debug("%s: cannot be checked", cache)
    ours = resume.scratch_root().absolute() / "caches"
    log.warning("%s: cannot be written; %s is used instead (HF_HOME names another folder)", cache, ours)
    with suppress(OSError):
        if (cache / "hub").is_dir():
            os.environ.setdefault("HF_HUB_CACHE", str(cache / "hub"))
        if (cache / "token").is_file():
            os.environ.setdefault("HF_TOKEN_PATH", str(cache / "token"))
    os.environ["HF_HOME"] = str(ours / "huggingface")
    os.environ.setdefault("TRITON_CACHE_DIR", str(ours / "triton"))


# Errors of the machine, not of the program. Windows lacks some of them.
_NAMES = ("ENOSPC", "EROFS", "EDQUOT", "EACCES", "EPERM", "EIO", "EMFILE")
_MACHINE = {getattr(errno, name, None) for name in _NAMES} - {None}
_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


def _in_a_line(error: BaseException) -> str | None:
    """The message that replaces a traceback; None if the error is a fault of the program."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno in _MACHINE:
        return f"{error.filename or 'a file'}: {error.strerror}; correct this, then run `dvc repro`, which resumes"
    if isinstance(error, MemoryError) or any(words in str(error) for words in _NO_MEMORY):
        first = " ".join(str(error).split())[:200]
        return f"out of memory ({first}); params.yaml: lower batch_tokens, batch or chunk_tokens"
    # Polars may refuse a file that pyarrow has read. Panics of other libraries have the same name, but another class.
    if (polars := sys.modules.get("polars")) is not None:
        is_refusal = isinstance(error, polars.exceptions.PolarsError) and str(error).startswith("parquet: ")
        if is_refusal or isinstance(error, polars.exceptions.PanicException):
            reason = str(error).removeprefix("parquet: ")
            return f"a Parquet file below data/ is damaged ({reason}); `make verify` finds it"
    return None


def is_ahead() -> bool:
    """Whether this process computes the result of a stage before DVC runs that stage."""
    return AHEAD in os.environ


def is_distributed() -> bool:
    """Whether a launcher has started this process as one of several."""
    return any(rank in os.environ for rank in resume.RANKS)


def end_with_dvc() -> None:
    """Let the kernel kill this process when the DVC process that started it ends (Linux only).

    Otherwise a stage outlives a killed DVC, and computes for hours what the next `dvc repro` computes again. `exec` in
    dvc.yaml replaces the shell, so that the stage is a child of DVC itself. The signal is SIGKILL: Lightning handles
    SIGTERM as a request, which it does not check while it waits for another process.
    """
    if sys.platform == "linux" and "DVC_ROOT" in os.environ:
        import ctypes

        ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG
        if os.getppid() != _PARENT:  # DVC had ended before that call, which then does nothing
            os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def alone() -> Iterator[None]:
    """Wait until no other process runs the same stage in the same folder, and keep others from starting it.

    Both would write the same outputs, and the first to end would delete the scratch folder of the other.
    """
    name = "@".join([Path(sys.argv[0]).stem, *sys.argv[1:]]).replace("/", "_")
    resume.work.name = name
    if not resume.is_first_rank():
        yield  # the first process holds the lock for all
        return
    path = resume.scratch_root() / "locks" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    lock, holder = FileLock(path, fallback_to_soft=False), path.with_name(f"{name}.pid")
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if is_ahead():
                sys.exit(0)
            pid = holder.read_text() if holder.is_file() else "unknown"
            log.warning("%s: waiting for process %s, which is still at this work; kill it to go on", name, pid)
            lock.acquire(poll_interval=0.5)
        resume.work.is_alone = True
    except (OSError, NotImplementedError) as error:  # some network file systems have no locks
        log.debug("%s: not locked (%s)", name, error)
    with suppress(OSError):  # it only serves the message above
        holder.write_text(str(os.getpid()))
    try:
        yield
        resume.prune()
    finally:
        resume.work.name, resume.work.is_alone = "", False
        lock.release()


def table(head: Sequence[str], rows: Iterable[Sequence[object]], labels: int = 1) -> None:
    """Log a table with aligned columns: the first `labels` columns are text, the others figures."""
    lines = [[str(cell) for cell in row] for row in (head, *rows)]
    for line in aligned(lines, right=range(labels, len(head))):
        log.info("%s", line)
