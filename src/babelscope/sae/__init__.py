"""TopK sparse autoencoders: the model, its training, its quality and its files."""

from babelscope.sae.autoencoder import SAE
from babelscope.sae.cache import CachedSAE, SAECache
from babelscope.sae.checkpoint import load

__all__ = ["SAE", "CachedSAE", "SAECache", "load"]
