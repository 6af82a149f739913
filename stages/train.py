"""Stage `train <hookpoint>`: the SAE of one hookpoint: trained here, trained by stage `stream`, or a released one."""

import sys

from babelscope import config
from babelscope.core import stage
from babelscope.core.paths import Paths


def main() -> None:
    params = config.load()
    config.check_folders(params)
    hookpoint = config.hookpoint_argument(sys.argv, params)
    from babelscope.sae.training.run import run  # its imports take seconds: params.yaml is checked before

    run(params, Paths(), hookpoint)


if __name__ == "__main__":
    stage.run(main)
