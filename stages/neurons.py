"""Stage `neurons`: how often every neuron of `neurons.hookpoints` fires on every language of the training split."""

from babelscope import config
from babelscope.core import paths, stage


def main() -> None:
    params = config.load()
    from babelscope.features.run_neurons import run  # its imports take seconds: params.yaml is checked before

    run(params, paths.Paths())


if __name__ == "__main__":
    stage.run(main)
