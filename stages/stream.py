"""Stage `stream`: all SAEs at once from a running forward pass if `train.source` is `stream`; else nothing."""

import logging
import os
import shutil

from babelscope import config
from babelscope.core import stage
from babelscope.core.files import write_json
from babelscope.core.paths import Paths


def main() -> None:
    params, paths = config.load(), Paths()
    config.check_folders(params)
    shutil.rmtree(paths.stream, ignore_errors=True)
    if params.train.source == "stream":
        # How many products PyTorch keeps prepared, 0.4 MiB each; texts always have new shapes. Read at torch's import.
        os.environ.setdefault("LRU_CACHE_CAPACITY", "64")
        from babelscope.features.run_stream import run  # its imports take seconds: most runs do not need them

        run(params, paths)
    else:
        logging.info("stream: nothing to do (params.yaml: train.source is %r)", params.train.source)
    write_json(paths.stream_mode, {"source": params.train.source})


if __name__ == "__main__":
    stage.run(main)
