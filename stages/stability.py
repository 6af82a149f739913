"""Stage `stability`: which features an SAE trained from another seed finds again, and whether they fire alike."""

from babelscope import config
from babelscope.core import paths, stage


@stage.script
def main() -> None:
    params = config.load()
    from babelscope.features.run_stability import run

    run(params, paths.Paths())
