"""Stage `score`: which features and neurons belong to which language."""

from babelscope import config
from babelscope.core import paths, stage


@stage.script
def main() -> None:
    params = config.load()
    from babelscope.features.run_score import run

    run(params, paths.Paths())
