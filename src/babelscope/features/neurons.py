"""Firings of a model's own neurons, counted in a forward pass without storing activations."""

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from babelscope.core import resume
from babelscope.core.progress import Progress
from babelscope.features.counter import Counter
from babelscope.models.forward import read_batches, widths
from babelscope.models.hookpoints import device_of
from babelscope.models.tokens import TokenizedTexts

log = logging.getLogger(__name__)

# Seconds between two checkpoints, which a killed run may lose.
SAVE_EVERY = 30.0


def count(
    model: Any,
    texts: TokenizedTexts,
    hookpoints: Sequence[str],
    languages: Sequence[str],
    *,
    dtype: torch.dtype,
    batch_tokens: int,
    checkpoint: Path,
) -> dict[str, Counter]:
    """Count, per language and neuron, the tokens on which the neuron's activation is > 0 (Tang et al. 2024).

    One forward pass over the texts as far as the deepest hookpoint; special tokens are not counted. Memory: the
    activations of one batch, and five numbers per language and neuron.

    Parameters
    ----------
    texts: `texts.frame` has `language`.
    hookpoints: activation functions (`layers.N.mlp.act_fn`), whose dimensions are neurons.
    dtype: what activations are rounded to, as for all other units.
    batch_tokens: tokens in one forward pass, padding included.
    checkpoint: file from which a killed run resumes; the caller deletes it when the counts are written.

    Raises
    ------
    UserError: an activation is not finite in `dtype`, the forward pass never reaches a hookpoint, or a hookpoint
        does not give one vector per token, in the order of the tokens.
    """
    device = device_of(model)
    found = widths(model, hookpoints, "neurons.hookpoints")
    counters = {name: Counter(languages, d, device) for name, d in found.items()}
    language, batches, finished = texts.codes(languages), texts.batches(batch_tokens), _restore(checkpoint, counters)
    saved = time.monotonic()
    with Progress("neurons", int(texts.lengths.sum()), "tokens") as progress:
        progress.skip(sum(int(texts.lengths[numbers].sum()) for numbers in batches[:finished]))
        passes = read_batches(model, texts, batches[finished:], hookpoints, dtype)
        for done, (activations, text) in enumerate(passes, start=finished + 1):
            for name, x in activations.items():
                counters[name].add_dense(x, language[text].to(device), text.to(device))
            if time.monotonic() - saved >= SAVE_EVERY:
                _save(checkpoint, counters, done)
                saved = time.monotonic()
            progress.update(len(text))
    return counters


def _save(path: Path, counters: dict[str, Counter], batches: int) -> None:
    tables = {f"{name}/{key}": table for name, counter in counters.items() for key, table in counter.state().items()}
    resume.write_part(path, tables | {"batches": torch.tensor(batches)})


def _restore(path: Path, counters: dict[str, Counter]) -> int:
    """Restore the counts of a killed run; returns the number of batches that it counted."""
    tables = resume.read_part(path)
    if tables is None:
        return 0
    for name, counter in counters.items():
        for key, table in counter.state().items():
            table.copy_(tables[f"{name}/{key}"])
    log.info("neurons: resumed after batch %d of an earlier run", int(tables["batches"]))
    return int(tables["batches"])
