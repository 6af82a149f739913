"""Stage `retrain <hookpoint>`: one hookpoint's SAE from another seed, which `stability` compares."""

from babelscope import config
from babelscope.core import paths, stage


def main() -> None:
    params, hookpoint = config.load_at_hookpoint()
    from babelscope.sae.training.rerun import run  # its imports take seconds: params.yaml is checked before

    run(params, paths.Paths(), hookpoint)


if __name__ == "__main__":
    stage.run(main)
