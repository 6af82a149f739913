"""Stage `encode <hookpoint>`: how often every latent fires on every language of the training split."""

from babelscope import config
from babelscope.core import paths, stage


@stage.script
def main() -> None:
    params, hookpoint = config.load_at_hookpoint()
    from babelscope.features.run_encode import run

    run(params, paths.Paths(), hookpoint)
