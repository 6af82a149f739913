"""Stage `dictionary <name>`: a dictionary that shows what training and the model contribute, for stage `baselines`."""

from babelscope import config
from babelscope.core import paths, stage


def main() -> None:
    params, name = config.load_at_dictionary()
    from babelscope.baselines.dictionaries import run  # its imports take seconds, so params.yaml is checked first

    run(params, paths.Paths(), name)


if __name__ == "__main__":
    stage.run(main)
