"""Stage `script`: do features follow a language or its script? They are tried on romanised and on shuffled texts."""

from babelscope import config
from babelscope.core import paths, stage


def main() -> None:
    params = config.load()
    from babelscope.script.run import run  # its imports take seconds, so params.yaml is checked first

    run(params, paths.Paths())


if __name__ == "__main__":
    stage.run(main)
