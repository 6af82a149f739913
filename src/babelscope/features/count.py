"""One running forward pass with finished SAEs: firings on the training texts, quality on the held-out ones."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import polars as pl
import torch
from torch import Tensor

from babelscope.features.counter import Counter, totals
from babelscope.models.forward import names_to_read, read_batches
from babelscope.models.names import layer_of
from babelscope.models.tokens import TokenizedTexts
from babelscope.sae.autoencoder import SAE
from babelscope.sae.metrics import Quality, QualitySums


class Counted(NamedTuple):
    """What was measured of one SAE.

    Attributes
    ----------
    counts: firings on the texts that are not held out, see `Counter.frame`.
    totals: `language`, `tokens`, `texts` of these texts.
    quality: on the held-out texts.
    """

    counts: pl.DataFrame
    totals: pl.DataFrame
    quality: Quality


class _Chunk:
    """Whole texts that wait until there are enough of them."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.rows = 0
        self.parts: dict[str, list[Tensor]] = {}

    def add(self, number: int, rows: Mapping[str, Tensor]) -> None:
        self.numbers.append(number)
        self.rows += len(next(iter(rows.values())))
        for name, x in rows.items():
            self.parts.setdefault(name, []).append(x.clone())  # a view would keep its whole batch


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
    advance: Callable[[int], object] = lambda tokens: None,
) -> dict[str, Counted]:
    """Count the firings of every latent, as `extract` and `encode` do through files, but with nothing stored.

    The forward passes are those of `extract` and the chunks those of `encode`: on the same machine the counts are
    those that stored activations give. Memory: two chunks of activations at every hookpoint, one forward pass, and the
    counters.

    Parameters
    ----------
    model: a causal language model.
    texts: `texts.frame` has `language` and `split`; texts of the split "eval" are held out.
    saes: by hookpoint, on the device of the model.
    languages: names.
    dtype: what activations are rounded to.
    batch_tokens: tokens in one forward pass, padding included.
    chunk_tokens: tokens encoded at once.
    advance: is called with the number of tokens that have just been done.

    Raises
    ------
    UserError: the model has no such hookpoint, or an activation is not finite in `dtype`.
    """
    names = names_to_read(list(saes), any(sae.is_transcoder for sae in saes.values()))
    counters = {name: Counter(languages, sae.latents) for name, sae in saes.items()}
    sums = {name: QualitySums(sae, len(languages)) for name, sae in saes.items()}
    language, held_out = texts.codes(languages), (texts.frame["split"] == "eval").to_list()

    def flush(chunk: _Chunk, is_held_out: bool) -> None:
        text = torch.tensor(chunk.numbers, dtype=torch.int64).repeat_interleave(texts.lengths[chunk.numbers])
        for name, sae in saes.items() if chunk.numbers else ():
            target = torch.cat(chunk.parts[name])
            x, y = (torch.cat(chunk.parts[sae.input_name(name)]), target) if sae.is_transcoder else (target, None)
            if is_held_out:
                sums[name].add(x, y, language[text])
            else:
                values, indices = sae.encode(x)
                counters[name].add(values.cpu(), indices.cpu(), language[text], text)
        advance(len(text))

    chunks = {False: _Chunk(), True: _Chunk()}
    for rows in read_batches(model, texts, texts.batches(batch_tokens), names, dtype):
        start = 0
        for number in torch.unique_consecutive(rows.text).tolist():
            end, which = start + int(texts.lengths[number]), held_out[number]
            if chunks[which].rows and chunks[which].rows + end - start > chunk_tokens:
                flush(chunks[which], which)
                chunks[which] = _Chunk()
            chunks[which].add(number, {name: x[start:end] for name, x in rows.activations.items()})
            start = end
    for which, chunk in chunks.items():
        flush(chunk, which)
    of = totals(texts.frame.filter(split="train"), languages)
    return {name: Counted(counters[name].frame(layer_of(name)), of, sums[name].result()) for name in saes}
