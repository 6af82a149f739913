"""Stage `stream`: all SAEs at once from a running forward pass if `train.source` is `stream`; else nothing."""

import logging
import os
import shutil

from babelscope.config import Config, check_folders
from babelscope.core.files import write_json
from babelscope.core.paths import Paths

log = logging.getLogger(__name__)


def run(params: Config, paths: Paths) -> None:
    """Write `paths.stream`: what `train` and `encode` copy, or only that there is nothing to copy."""
    check_folders(params)
    shutil.rmtree(paths.stream, ignore_errors=True)
    if params.train.source == "stream":
        # How many products PyTorch keeps prepared, 0.4 MiB each; texts always have new shapes. Read at torch's import.
        os.environ.setdefault("LRU_CACHE_CAPACITY", "64")
        from babelscope.features.stream import stream  # its imports take seconds: most runs do not need them

        stream(params, paths)
    else:
        log.info("stream: nothing to do (params.yaml: train.source is %r)", params.train.source)
    write_json(paths.stream_mode, {"source": params.train.source})
