"""Stage `ablate`: remove each language's features and measure the NLL of every language on held-out text."""

from babelscope import config
from babelscope.core import paths, stage


@stage.script
def main() -> None:
    params = config.load()
    from babelscope.ablation.run import run

    run(params, paths.Paths())
