"""Stage `encode <hookpoint>`: how often every latent fires on every language of the training split."""

from babelscope import config
from babelscope.core import paths, stage


def main() -> None:
    params, hookpoint = config.load_at_hookpoint()
    from babelscope.features.run_encode import run  # its imports take seconds: params.yaml is checked before

    run(params, paths.Paths(), hookpoint)


if __name__ == "__main__":
    stage.run(main)
