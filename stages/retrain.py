"""Stage `retrain <hookpoint> <seed>`: one hookpoint's SAE from another seed, which `stability` compares."""

from babelscope import config
from babelscope.core import paths, stage


@stage.script
def main() -> None:
    params, hookpoint, seed = config.load_at_seed()
    from babelscope.sae.training.rerun import run

    run(params, paths.Paths(), hookpoint, seed)
