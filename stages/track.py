"""Stage `track`: log the pipeline's state to MLflow. It always runs and writes no output."""

from babelscope import config
from babelscope.core import paths, stage


@stage.script
def main() -> None:
    config.load()
    from babelscope.tracking.sync import sync

    sync(paths.Paths())
