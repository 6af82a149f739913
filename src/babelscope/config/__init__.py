"""`params.yaml` as a typed, validated model. Params are tracked as params: no stage depends on this package."""

from babelscope.config.checks import Config
from babelscope.config.loading import (
    check_folders,
    load,
    load_at_dictionary,
    load_at_hookpoint,
    load_at_seed,
    parse,
    read_yaml,
)
from babelscope.config.schema import Model

__all__ = [
    "Config", "Model", "check_folders", "load", "load_at_dictionary", "load_at_hookpoint", "load_at_seed", "parse",
    "read_yaml",
]  # fmt: skip
