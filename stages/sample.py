"""Stage `sample`: the texts of every language, split for training and evaluation."""

from babelscope import config
from babelscope.core import paths, stage


@stage.script
def main() -> None:
    params = config.load()
    from babelscope.corpus.run import run

    run(params, paths.Paths())
