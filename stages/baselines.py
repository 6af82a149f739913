"""Stage `baselines`: language features next to directions, frozen dictionaries and neurons, on the same texts."""

from babelscope import config
from babelscope.core import paths, stage


@stage.script
def main() -> None:
    params = config.load()
    from babelscope.baselines.run import run

    run(params, paths.Paths())
