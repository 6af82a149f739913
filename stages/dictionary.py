"""Stage `dictionary <name>`: a dictionary that shows what training and the model contribute, for stage `baselines`."""

from babelscope import config
from babelscope.core import paths, stage


@stage.script
def main() -> None:
    params, name = config.load_at_dictionary()
    from babelscope.baselines.dictionaries import run

    run(params, paths.Paths(), name)
