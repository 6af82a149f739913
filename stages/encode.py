"""Stage `encode <hookpoint>`: how often every latent fires on every language of the training split."""

import sys

from babelscope import config
from babelscope.core import stage
from babelscope.core.paths import Paths


def main() -> None:
    params = config.load()
    from babelscope.features.run_encode import run  # its imports take seconds: params.yaml is checked before

    run(params, Paths(), config.hookpoint_argument(sys.argv, params))


if __name__ == "__main__":
    stage.run(main)
