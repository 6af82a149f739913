"""Stage `prune`: delete the outputs of hookpoints that params.yaml no longer lists."""

from babelscope import config
from babelscope.core import stage
from babelscope.core.paths import Paths
from babelscope.tracking.prune import run


def main() -> None:
    run(config.load(), Paths())


if __name__ == "__main__":
    stage.run(main)
