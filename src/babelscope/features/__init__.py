"""What is known about a unit: firing counts, SAE-LAPE, LAPE, monolinguality, similarity, stability, top examples."""

from babelscope.features.lape import lape, probability_bar
from babelscope.features.monolinguality import monolinguality
from babelscope.features.sae_lape import sae_lape, summary
from babelscope.features.similarity import similarity

__all__ = ["lape", "monolinguality", "probability_bar", "sae_lape", "similarity", "summary"]
