"""Stage `sharing`: how many latents a text shares with its translations, layer by layer."""

from babelscope import config
from babelscope.core import paths, stage


@stage.script
def main() -> None:
    params = config.load()
    from babelscope.features.run_sharing import run

    run(params, paths.Paths())
