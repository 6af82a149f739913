"""Stage `report`: an HTML page of all results, an HTML page of the features, pictures, and DVC's plots."""

from babelscope import config
from babelscope.core import paths, stage


@stage.script
def main() -> None:
    params = config.load()
    from babelscope.report.run import run

    run(params, paths.Paths())
