"""Stage `retrain <hookpoint> <seed>`: one hookpoint's SAE from another seed, which `stability` compares."""

from babelscope import config
from babelscope.core import paths, stage


def main() -> None:
    params, hookpoint, seed = config.load_at_seed()
    from babelscope.sae.training.rerun import run  # its imports take seconds: params.yaml is checked before

    run(params, paths.Paths(), hookpoint, seed)


if __name__ == "__main__":
    stage.run(main)
