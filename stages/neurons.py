"""Stage `neurons`: how often every neuron of `neurons.hookpoints` fires on every language of the training split."""

from babelscope import config
from babelscope.core import paths, stage


@stage.script
def main() -> None:
    params = config.load()
    from babelscope.features.run_neurons import run

    run(params, paths.Paths())
