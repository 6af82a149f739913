"""Babelscope: find which features inside a language model belong to which language, and prove it."""

import importlib
import os
from typing import Any

# OpenMP threads that wait spin for 10,000 turns, then sleep. libgomp's default of 300,000 turns slows a stage down on a
# busy machine, 0 turns on an idle one (`benchmarks/busy.py`). libgomp reads the variable when torch is imported, so it
# is set here. A user's own setting wins.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# Public names by module. They are imported on first use (PEP 562), since importing torch takes seconds.
_HOMES = {
    "FeatureAblation": "ablation.interventions",
    "SAE": "sae",
    "ablate": "ablation.ablate",
    "count": "features.count",
    "identify": "identification.classify",
    "lape": "features",
    "load_model": "models.loading",
    "load_tokenizer": "models.loading",
    "sae_lape": "features",
}
__all__ = sorted(_HOMES)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
