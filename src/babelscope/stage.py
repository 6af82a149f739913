"""What every stage script shares: logging, quiet libraries, errors that a user can read, and the closing table."""

import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType

from babelscope.errors import UserError
from babelscope.redact import redact

log = logging.getLogger(__name__)

# No tool phones home, and no library prints bars of its own into a log. A user's own setting wins.
_QUIET = {
    "DVC_NO_ANALYTICS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "DO_NOT_TRACK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    # It warns of packed GGUF weights also where it was told to unpack them.
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "true",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}


class _Redacting(logging.Formatter):
    """Keeps credentials out of the log, whichever library it is that names them."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def _show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """As Python shows what nothing has caught, without credentials."""
    sys.stderr.write(redact("".join(traceback.format_exception(kind, error, trace))))


def run(main: Callable[[], None]) -> None:
    """Run a stage's `main`: log to stderr, print a `UserError` as one message and end with exit code 1."""
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
    try:
        main()
    except UserError as error:
        print(f"error: {redact(str(error))}", file=sys.stderr)
        sys.exit(1)


def table(head: Sequence[str], rows: Iterable[Sequence[object]], labels: int = 1) -> None:
    """Log what a stage found as aligned columns, of text (the first `labels`) and of figures (the others)."""
    lines = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = zip(line, widths, strict=True)
        aligned = (cell.ljust(width) if i < labels else cell.rjust(width) for i, (cell, width) in enumerate(cells))
        log.info("%s", "  ".join(aligned).rstrip())
