"""`params.yaml` as a typed, validated model. Params are tracked as params: no stage depends on this package."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_HOMES = {"Config": "checks", "Model": "schema"}  # the others are in `loading`
__all__ = [
    "Config", "Model", "check_folders", "load", "load_at_dictionary", "load_at_hookpoint", "load_at_seed", "parse",
    "read_yaml",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import pydantic when it is needed: a process whose stage is run by another one needs none of this."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'loading')}"), name)
