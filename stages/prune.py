"""Stage `prune`: delete the outputs of hookpoints that params.yaml no longer lists."""

from babelscope import config
from babelscope.core import paths, stage


@stage.script
def main() -> None:
    params = config.load()
    from babelscope.tracking.prune import run

    run(params, paths.Paths())
