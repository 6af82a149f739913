"""Stage `explain`: a language model explains the first features of each language, if `explain.endpoint` is set."""

from babelscope import config
from babelscope.core import paths, stage


@stage.script
def main() -> None:
    params = config.load()
    from babelscope.explain.run import run

    run(params, paths.Paths())
