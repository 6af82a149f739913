"""Stage `baselines`: language features next to directions, frozen dictionaries and neurons, on the same texts."""

from babelscope import config
from babelscope.core import paths, stage


def main() -> None:
    params = config.load()
    from babelscope.baselines.run import run  # its imports take seconds, so params.yaml is checked first

    run(params, paths.Paths())


if __name__ == "__main__":
    stage.run(main)
