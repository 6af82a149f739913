"""Public names (docs/contracts.md) that `babelscope.features` defines."""

from babelscope.features import lape, monolinguality, probability_bar, sae_lape, similarity, summary

__all__ = ["lape", "monolinguality", "probability_bar", "sae_lape", "similarity", "summary"]
