"""Stage `steer`: generate from the same prompts with each language's features amplified; does the language change?"""

from babelscope import config
from babelscope.core import paths, stage


def main() -> None:
    params = config.load()
    from babelscope.steering.run import run  # its imports take seconds: params.yaml is checked before

    run(params, paths.Paths())


if __name__ == "__main__":
    stage.run(main)
