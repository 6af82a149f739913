"""Stage `switching`: a language's features where a sentence switches to it, and what removing them does there."""

from babelscope import config
from babelscope.core import paths, stage


@stage.script
def main() -> None:
    params = config.load()
    from babelscope.switching.run import run

    run(params, paths.Paths())
