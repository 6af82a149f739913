"""Stage `extend`: activations of languages that are compared, but train no SAE."""

from babelscope import config
from babelscope.activations.run_extend import run
from babelscope.core import paths, stage


def main() -> None:
    run(config.load(), paths.Paths())


if __name__ == "__main__":
    stage.run(main)
