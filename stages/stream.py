"""Stage `stream`: train all SAEs during one forward pass if `train.source` is `stream`."""

from babelscope import config
from babelscope.core import paths, stage


@stage.script
def main() -> None:
    params = config.load()
    from babelscope.features.run_stream import run

    run(params, paths.Paths())
