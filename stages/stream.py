"""Stage `stream`: all SAEs at once from a running forward pass if `train.source` is `stream`; else nothing."""

from babelscope import config
from babelscope.core import paths, stage


def main() -> None:
    params = config.load()
    from babelscope.features.run_stream import run  # its imports take seconds: params.yaml is checked before

    run(params, paths.Paths())


if __name__ == "__main__":
    stage.run(main)
