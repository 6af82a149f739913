"""One running forward pass with finished SAEs: firings on the training texts, quality on the held-out ones."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from babelscope.features.counter import Counter
from babelscope.models import hookpoints as hooks
from babelscope.models.forward import collate, names_to_read, own_activations
from babelscope.models.text_batch import PackedTexts
from babelscope.sae.autoencoder import SAE
from babelscope.sae.metrics import Quality, QualitySums


class Measured(NamedTuple):
    """What was found out about one SAE: its firings on the training texts, its quality on the held-out ones."""

    counts: Counter
    quality: Quality


class _Waiting:
    """Whole texts whose activations wait for the chunk to be full."""

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
def measure(
    model: Any,
    texts: PackedTexts,
    language: Tensor,
    held_out: Tensor,
    saes: Mapping[str, SAE],
    languages: Sequence[str],
    *,
    dtype: torch.dtype,
    batch_tokens: int,
    chunk_tokens: int,
    advance: Callable[[int], object] = lambda tokens: None,
) -> dict[str, Measured]:
    """Measure SAEs on texts whose activations are stored nowhere.

    The forward passes are those of `extract` and the chunks those of `encode`: on the same machine the counts are
    those that stored activations give. Memory: two chunks of activations at every hookpoint, one forward pass, and the
    counters.

    Parameters
    ----------
    model: a causal language model.
    texts: of both splits.
    language: number of each text's language, int64 [texts].
    held_out: bool [texts].
    saes: by hookpoint, on the device of the model.
    languages: names.
    dtype: what activations are rounded to.
    batch_tokens: tokens in one forward pass, padding included.
    chunk_tokens: tokens encoded at once.
    advance: told how many tokens are done.

    Raises
    ------
    UserError: an activation is not finite in `dtype`.
    """
    names = names_to_read(list(saes), any(sae.b_in is not None for sae in saes.values()))
    counters = {name: Counter(languages, sae.latents) for name, sae in saes.items()}
    sums = {name: QualitySums(sae, len(languages)) for name, sae in saes.items()}

    def flush(waiting: _Waiting, is_held_out: bool) -> None:
        if not waiting.numbers:
            return
        own = texts.own[waiting.numbers]
        code = language[waiting.numbers].repeat_interleave(own)
        text = torch.arange(len(own)).repeat_interleave(own)
        for name, sae in saes.items():
            target = torch.cat(waiting.parts[name])
            x, y = (target, None) if sae.b_in is None else (torch.cat(waiting.parts[name + hooks.INPUT]), target)
            if is_held_out:
                sums[name].add(x, y, code)
            else:
                values, indices = sae.encode(x)
                counters[name].add(values.cpu(), indices.cpu(), code, text)
        advance(len(text))

    device = hooks.device_of(model)
    chunks = {False: _Waiting(), True: _Waiting()}
    for numbers, batch in texts.batches(texts.by_length(), batch_tokens):
        ids, mask, own_mask = (part.to(device) for part in collate(batch))
        rows, place = own_activations(model, names, (ids, mask, own_mask), dtype), 0
        for number, text in zip(numbers, batch, strict=True):
            which = bool(held_out[number])
            if chunks[which].rows and chunks[which].rows + text.own > chunk_tokens:
                flush(chunks[which], which)
                chunks[which] = _Waiting()
            chunks[which].add(number, {name: x[place : place + text.own] for name, x in rows.items()})
            place += text.own
    for which, waiting in chunks.items():
        flush(waiting, which)
    return {name: Measured(counters[name], sums[name].result()) for name in saes}
