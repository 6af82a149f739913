"""Stage `identify`: predict the language of texts from the units that fire, and compare with fastText."""

from babelscope import config
from babelscope.core import paths, stage


@stage.script
def main() -> None:
    params = config.load()
    from babelscope.identification.run import run

    run(params, paths.Paths())
