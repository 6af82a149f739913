"""Stage `quality`: how much of the model's loss on held-out text each SAE's reconstruction recovers, per language."""

from babelscope import config
from babelscope.core import paths, stage


@stage.script
def main() -> None:
    params = config.load()
    from babelscope.quality.run import run

    run(params, paths.Paths())
