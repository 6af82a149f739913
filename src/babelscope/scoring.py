"""The names that the contract promises (docs/contracts.md); their home is `babelscope.features`."""

from babelscope.features import lape, monolinguality, probability_bar, sae_lape, similarity, summary

__all__ = ["lape", "monolinguality", "probability_bar", "sae_lape", "similarity", "summary"]
