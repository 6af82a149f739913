"""TopK sparse autoencoders: the model, its training, its quality and its files."""

from babelscope.sae.autoencoder import SAE
from babelscope.sae.checkpoint import load
from babelscope.sae.shelf import Shelf, Shelved

__all__ = ["SAE", "Shelf", "Shelved", "load"]
