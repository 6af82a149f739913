"""Stage `switching`: a language's features where a sentence switches to it, and what removing them does there."""

from babelscope import config
from babelscope.core import paths, stage


def main() -> None:
    params = config.load()
    from babelscope.switching.run import run  # its imports take seconds: params.yaml is checked before

    run(params, paths.Paths())


if __name__ == "__main__":
    stage.run(main)
