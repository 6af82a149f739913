"""Firings on the training texts and quality on the held-out ones, from a forward pass with finished SAEs."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import polars as pl
import torch
from torch import Tensor

from babelscope.features.counter import Counter, totals, whole_texts
from babelscope.models.forward import names_to_read, read_divided
from babelscope.models.names import layer_of
from babelscope.models.tokens import TokenizedTexts
from babelscope.sae.autoencoder import SAE
from babelscope.sae.metrics import Quality, QualitySums


class Counted(NamedTuple):
    """The results for one SAE.

    Attributes
    ----------
    counts: firings on the texts that are not held out, see `Counter.frame`.
    totals: `language`, `tokens`, `texts` of these texts.
    quality: on the held-out texts.
    """

    counts: pl.DataFrame
    totals: pl.DataFrame
    quality: Quality


@torch.no_grad()
def count(
    model: Any,
    texts: TokenizedTexts,
    saes: Mapping[str, SAE],
    languages: Sequence[str],
    *,
    dtype: torch.dtype = torch.float32,
    batch_tokens: int = 2048,
    chunk_tokens: int = 8192,
    shares: Sequence[Sequence[str]] = (),
    advance: Callable[[int], object] = lambda tokens: None,
) -> dict[str, Counted]:
    """Count the firings of every latent as `extract` and `encode` do, but without stored activations.

    The batches are those of `extract` and the chunks those of `encode`: on the same machine the counts are the same.
    Memory: the counters and, for each split, a chunk and a batch of activations at every hookpoint.

    Parameters
    ----------
    texts: `texts.frame` has `language` and `split`; texts of the split "eval" are held out.
    saes: by hookpoint, on the device of the model.
    dtype: what activations are rounded to.
    batch_tokens: tokens in one forward pass, padding included.
    chunk_tokens: tokens encoded at once.
    shares: if several processes divide the hookpoints, those of each; `saes` are then those of this process, and each
        computes a share of the forward passes.
    advance: called with the number of tokens of every finished chunk.

    Raises
    ------
    UserError: the model has no such hookpoint, or an activation is not finite in `dtype`.
    """
    transcode = any(sae.is_transcoder for sae in saes.values())
    names = [names_to_read(share, transcode) for share in shares or [list(saes)]]
    counters = {name: Counter(languages, sae.latents, sae.b_dec.device) for name, sae in saes.items()}
    sums = {name: QualitySums(sae, len(languages)) for name, sae in saes.items()}
    language, held_out = texts.codes(languages), (texts.frame["split"] == "eval").to_torch()

    def measure(rows: Mapping[str, Tensor], text: Tensor, is_held_out: bool) -> None:
        for name, sae in saes.items():
            x, y = (rows[sae.input_name(name)], rows[name]) if sae.is_transcoder else (rows[name], None)
            if is_held_out:
                sums[name].add(x, y, language[text])
            else:
                values, indices = sae.encode(x)
                counters[name].add(values, indices, language[text].to(x.device), text.to(x.device))
        advance(len(text))

    # By split: the texts after the last full chunk.
    waiting: dict[bool, tuple[dict[str, Tensor], Tensor]] = {}
    for activations, text in read_divided(model, texts, texts.batches(batch_tokens), names, dtype):
        for split in set(held_out[text].tolist()):
            mask = held_out[text] == split
            rows, numbers = {name: x[mask.to(x.device)] for name, x in activations.items()}, text[mask]
            if split in waiting:
                before, earlier = waiting[split]
                rows = {name: torch.cat([before[name], x]) for name, x in rows.items()}
                numbers = torch.cat([earlier, numbers])
            *full, (last, _) = whole_texts(numbers, chunk_tokens)
            for start, end in full:
                measure({name: x[start:end] for name, x in rows.items()}, numbers[start:end], split)
            waiting[split] = {name: x[last:] for name, x in rows.items()}, numbers[last:]
    for split, (rows, numbers) in waiting.items():
        measure(rows, numbers, split)
    by_language = totals(texts.frame.filter(split="train"), languages)
    return {name: Counted(counters[name].frame(layer_of(name)), by_language, sums[name].result()) for name in saes}
