"""Stage `steer`: generate from the same prompts with each language's features amplified; does the language change?"""

from babelscope import config
from babelscope.core import paths, stage


@stage.script
def main() -> None:
    params = config.load()
    from babelscope.steering.run import run

    run(params, paths.Paths())
