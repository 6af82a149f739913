"""Stage `train <hookpoint>`: one hookpoint's SAE, trained here, trained by stage `stream`, or a released one."""

from babelscope import config
from babelscope.core import paths, stage


def main() -> None:
    params, hookpoint = config.load_at_hookpoint()
    from babelscope.sae.training.run import run  # its imports take seconds, so params.yaml is checked first

    run(params, paths.Paths(), hookpoint)


if __name__ == "__main__":
    stage.run(main)
