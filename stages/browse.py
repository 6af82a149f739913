"""Stage `browse`: the tables behind the feature browser, of selected features and of those that languages share."""

from babelscope import config
from babelscope.core import paths, stage


@stage.script
def main() -> None:
    params = config.load()
    from babelscope.browse.run import run

    run(params, paths.Paths())
