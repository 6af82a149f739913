"""Stage `retrain <hookpoint>`: the SAE of one hookpoint from another seed, for `stability` to compare."""

import sys

from babelscope import config
from babelscope.core import stage
from babelscope.core.paths import Paths


def main() -> None:
    params = config.load()
    hookpoint = config.hookpoint_argument(sys.argv, params)
    from babelscope.sae.training.rerun import run  # its imports take seconds: params.yaml is checked before

    run(params, Paths(), hookpoint)


if __name__ == "__main__":
    stage.run(main)
