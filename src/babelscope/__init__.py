"""Babelscope: find which features inside a language model belong to which language, and prove it."""

import importlib
import os
from typing import Any

# OpenMP threads spin for 10,000 turns while they wait, then sleep. With libgomp's default, 300,000 turns, they slow a
# stage down on a busy machine; without any they do on a quiet one (`benchmarks/busy.py` compares them). libgomp reads
# the variable when torch is imported, hence here. A user's own setting wins.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# What README uses, by the module that has it: imported when it is first asked for (PEP 562), since torch takes seconds.
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
