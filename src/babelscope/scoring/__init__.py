"""Firing counts in, features per language out: SAE-LAPE, LAPE, monolinguality (Polars alone)."""

from babelscope.scoring.lape import lape, probability_bar
from babelscope.scoring.monolinguality import monolinguality
from babelscope.scoring.sae_lape import sae_lape, summary
from babelscope.scoring.similarity import similarity

__all__ = ["lape", "monolinguality", "probability_bar", "sae_lape", "similarity", "summary"]
