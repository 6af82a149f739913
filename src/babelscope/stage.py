"""What every stage script shares: logging, quiet libraries, and errors that a user can read."""

import logging
import os
import sys
from collections.abc import Callable

from babelscope.errors import UserError

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


def run(main: Callable[[], None]) -> None:
    """Run a stage's `main`: log to stderr, print a `UserError` as one message and end with exit code 1."""
    for key, value in _QUIET.items():
        os.environ.setdefault(key, value)
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    for name in ("lightning", "lightning.pytorch", "lightning.fabric", "mlflow", "alembic", "httpx"):
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
