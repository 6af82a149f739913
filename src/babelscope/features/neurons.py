"""Firings of a model's own neurons, counted in a running forward pass: no activation is kept."""

import functools
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from babelscope.core.files import write_atomically
from babelscope.core.progress import Progress
from babelscope.core.resume import read_part
from babelscope.features.counter import Counter
from babelscope.models import hookpoints as hooks
from babelscope.models.forward import collate, own_activations, widths
from babelscope.models.text_batch import PackedTexts

log = logging.getLogger(__name__)

# Seconds between two checkpoints: what a killed run may lose.
SAVE_EVERY = 30.0


@torch.no_grad()
def count(
    model: Any,
    texts: PackedTexts,
    language: Tensor,
    hookpoints: Sequence[str],
    languages: Sequence[str],
    *,
    dtype: torch.dtype,
    batch_tokens: int,
    checkpoint: Path,
) -> dict[str, Counter]:
    """Count, per language and neuron, the tokens on which the neuron's activation is > 0 (Tang et al. 2024).

    One forward pass over the texts, stopped at the deepest hookpoint; special tokens are not counted. Memory: the
    activations of one batch, and five numbers per language and neuron.

    Parameters
    ----------
    model: a causal language model.
    texts: what is counted on.
    language: number of each text's language, int64 [texts].
    hookpoints: whose dimensions are neurons: activation functions (`layers.N.mlp.act_fn`).
    languages: names.
    dtype: what activations are rounded to, as those of every other unit are.
    batch_tokens: tokens in one forward pass, padding included.
    checkpoint: a file from which a killed run goes on; the caller deletes it once the counts are safe.

    Returns
    -------
    The counts by hookpoint.

    Raises
    ------
    UserError: an activation is not finite in `dtype`, the forward pass never reaches a hookpoint, or one does not give
        one vector per token, in the order of the tokens.
    """
    device = hooks.device_of(model)
    found = widths(model, hookpoints, "neurons.hookpoints")
    counters = {name: Counter(languages, d, device) for name, d in found.items()}
    finished = _restore(checkpoint, counters)
    saved = time.monotonic()
    with Progress("neurons", int(texts.own.sum()), "tokens") as progress:
        for done, (numbers, batch) in enumerate(texts.batches(texts.by_length(), batch_tokens), start=1):
            own = texts.own[numbers]
            if done <= finished:
                progress.skip(int(own.sum()))
                continue
            ids, mask, is_own = (part.to(device) for part in collate(batch))
            code = language[numbers].repeat_interleave(own).to(device)
            text = torch.arange(len(own)).repeat_interleave(own).to(device)
            for name, activations in own_activations(model, hookpoints, (ids, mask, is_own), dtype).items():
                counters[name].add_dense(activations, code, text)
            if time.monotonic() - saved >= SAVE_EVERY:
                _save(checkpoint, counters, done)
                saved = time.monotonic()
            progress.update(len(text))
    return counters


def _save(path: Path, counters: dict[str, Counter], batches: int) -> None:
    tables = {f"{name}/{key}": table for name, counter in counters.items() for key, table in counter.state().items()}
    write_atomically(path, functools.partial(save_file, tables | {"batches": torch.tensor(batches)}))


def _restore(path: Path, counters: dict[str, Counter]) -> int:
    """Set the counters to what a killed run left; returns how many batches that run had counted."""
    tables = read_part(path)
    if tables is None:
        return 0
    for name, counter in counters.items():
        for key, table in counter.state().items():
            table.copy_(tables[f"{name}/{key}"])
    log.info("neurons: going on after batch %d of an earlier run", int(tables["batches"]))
    return int(tables["batches"])
