"""Stage `train <hookpoint>`: one hookpoint's SAE, trained here, trained by stage `stream`, or a released one."""

from babelscope import config
from babelscope.core import paths, stage


@stage.script
def main() -> None:
    params, hookpoint = config.load_at_hookpoint()
    from babelscope.sae.training.run import run

    run(params, paths.Paths(), hookpoint)
