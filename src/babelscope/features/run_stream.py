"""Stage `stream`: train all SAEs during one forward pass if `train.source` is `stream`."""

import logging
import os
import shutil

from babelscope.config import Config, check_folders
from babelscope.core.files import write_json
from babelscope.core.paths import Paths

log = logging.getLogger(__name__)


def run(params: Config, paths: Paths) -> None:
    """Write the files that `train` and `encode` copy, and `paths.stream_mode`."""
    check_folders(params)
    shutil.rmtree(paths.stream, ignore_errors=True)
    if params.train.source == "stream":
        # Matrix products that PyTorch caches by shape, 0.4 MiB each; texts rarely repeat one. Read at torch's import.
        os.environ.setdefault("LRU_CACHE_CAPACITY", "64")
        from babelscope.features.stream import stream  # its imports take seconds, and most runs do not need them

        stream(params, paths)
    else:
        log.info("stream: nothing to do (params.yaml: train.source is %r)", params.train.source)
    write_json(paths.stream_mode, {"source": params.train.source})
