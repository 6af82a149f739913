"""Stage `track`: bring MLflow in line with the pipeline's state. Runs always, writes no output (DESIGN: MLflow)."""

from pathlib import Path

from babelscope import config, stage
from babelscope.tracking.sync import sync


def main() -> None:
    sync(Path(), config.load().model_dump())


if __name__ == "__main__":
    stage.run(main)
