"""The latents that fire on each of some texts, from stored activations."""

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from babelscope import sae
from babelscope.activations.store import opened
from babelscope.config import Config
from babelscope.core.paths import Paths
from babelscope.core.progress import Progress
from babelscope.features.counter import whole_texts
from babelscope.models import hardware


@torch.no_grad()
def measure(
    params: Config, paths: Paths, hookpoint: str, tokens: pl.DataFrame, texts: pl.DataFrame, progress: Progress
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """The latents that fire on each text, `[texts, latents]`, and each language's mean activation, `[languages, d]`."""
    device = hardware.prepare(params.hardware)
    dictionary = sae.load(paths.saes, hookpoint).to(device)
    activations = opened(paths, dictionary.input_name(hookpoint))
    rows, text = tokens["row"].to_torch(), tokens["text"].to_torch()
    present = [name for name in params.languages if name in set(texts["language"])]
    code = texts["language"].cast(pl.Enum(present)).to_physical().cast(pl.Int64).to_torch()
    fires = torch.zeros(len(texts), dictionary.latents, dtype=torch.bool)
    sums = torch.zeros(len(present), activations.d, dtype=torch.float64)
    for start, end in whole_texts(text, params.encode.chunk_tokens):
        x, number = activations.gather(rows[start:end]), text[start:end]
        values, indices = (each.cpu() for each in dictionary.encode(x.to(device)))
        row, column = (values > 0).nonzero(as_tuple=True)
        fires[number[row], indices[row, column]] = True
        sums.index_add_(0, code[number], x.double())
        progress.update(end - start)
    counts = torch.bincount(code[text], minlength=len(present))
    return fires.numpy(), (sums / counts.unsqueeze(1)).numpy()
