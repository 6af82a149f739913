"""Stage `extend`: the counts of all languages, with activations of those that train no SAE."""

from babelscope import config
from babelscope.core import paths, stage


def main() -> None:
    params = config.load()
    from babelscope.features.run_extend import run  # params.yaml is checked before

    run(params, paths.Paths())


if __name__ == "__main__":
    stage.run(main)
