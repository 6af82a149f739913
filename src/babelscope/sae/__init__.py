"""TopK sparse autoencoders: the model, its training, its quality and its files."""

from babelscope.sae.autoencoder import SAE
from babelscope.sae.cache import Shelf, Shelved
from babelscope.sae.checkpoint import load

__all__ = ["SAE", "Shelf", "Shelved", "load"]
