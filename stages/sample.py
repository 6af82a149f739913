"""Stage `sample`: the texts of every language, split for training and evaluation."""

from babelscope import config
from babelscope.core import paths, stage


def main() -> None:
    params = config.load()
    from babelscope.corpus.run import run  # its imports take seconds: params.yaml is checked before

    run(params, paths.Paths())


if __name__ == "__main__":
    stage.run(main)
