"""Stage `extend`: the counts of all languages, with activations of those that train no SAE."""

from babelscope import config
from babelscope.core import paths, stage


@stage.script
def main() -> None:
    params = config.load()
    from babelscope.features.run_extend import run

    run(params, paths.Paths())
