"""Stage `script`: do features follow a language or its script? They are tried on romanised and on shuffled texts."""

from babelscope import config
from babelscope.core import paths, stage


@stage.script
def main() -> None:
    params = config.load()
    from babelscope.script.run import run

    run(params, paths.Paths())
