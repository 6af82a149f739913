"""Stage `track`: bring MLflow in line with the pipeline's state. Runs always, writes no output."""

from pathlib import Path

from babelscope import config
from babelscope.core import stage
from babelscope.tracking.sync import sync


def main() -> None:
    config.load()
    # As the file has them, like dvc.lock: a validated data set also has the keys that the file leaves out.
    sync(Path(), config.read_yaml(Path("params.yaml")))


if __name__ == "__main__":
    stage.run(main)
