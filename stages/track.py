"""Stage `track`: log the pipeline's state to MLflow. It always runs and writes no output."""

from babelscope import config
from babelscope.core import stage
from babelscope.core.paths import Paths
from babelscope.tracking.sync import sync


def main() -> None:
    config.load()
    sync(Paths())


if __name__ == "__main__":
    stage.run(main)
