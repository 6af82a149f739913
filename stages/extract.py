"""Stage `extract`: activations at every hookpoint, from one forward pass over the sampled texts."""

from babelscope import config
from babelscope.core import paths, stage


@stage.script
def main() -> None:
    params = config.load()
    from babelscope.activations.run import run

    run(params, paths.Paths())
