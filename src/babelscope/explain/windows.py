"""Texts to explain a feature by, and others to test the explanation on."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from babelscope.sae.autoencoder import SAE

# Tokens encoded at once: bounds the memory.
CHUNK = 8192


class Window(NamedTuple):
    """A text and what one feature does in it.

    Attributes
    ----------
    text: its number.
    activations: one per token, >= 0; all 0 where the feature never fires.
    """

    text: int
    activations: list[float]


class Chosen(NamedTuple):
    """The texts of one feature: those that explain it, and others in which it fires, and in which it does not."""

    examples: list[Window]
    active: list[Window]
    silent: list[Window]


@torch.inference_mode()
def windows(
    sae: SAE,
    units: Sequence[int],
    gather: Callable[[Tensor], Tensor],
    spans: Sequence[tuple[int, int]],
    examples: int,
    scored: int,
    seed: int,
    advance: Callable[[int], None] = lambda tokens: None,
) -> list[Chosen]:
    """Choose texts for every unit.

    The examples are those in which it is most active. The others are drawn (Paulo et al. 2024, arXiv 2410.13928): from
    all further texts in which it fires, at even ranks of its largest activation, and at random from those in which it
    never does.

    Parameters
    ----------
    sae: the dictionary.
    units: numbers of its latents.
    gather: rows (int64) -> activations `[rows, d]`.
    spans: first row and row after the last of every text.
    examples, scored: how many texts explain a unit, and how many of each kind test it (fewer where there are no more).
    seed: of the draws; those of one unit depend on no other.
    advance: called with the tokens read since the last call.
    """
    column = torch.full((sae.latents,), -1)
    column[torch.tensor(list(units))] = torch.arange(len(units))
    peak = torch.zeros((len(spans), len(units)))
    for numbers, dense in _chunks(sae, gather, spans, range(len(spans)), column, len(units)):
        for number, part in zip(numbers, dense, strict=True):
            peak[number] = part.amax(0)
        advance(sum(map(len, dense)))
    picked = [_pick(peak[:, place].numpy(), examples, scored, [seed, unit]) for place, unit in enumerate(units)]
    needed = sorted({text for some in picked for part in some for text in part})
    chunks = _chunks(sae, gather, spans, needed, column, len(units))
    shown = {text: part for texts, dense in chunks for text, part in zip(texts, dense, strict=True)}
    return [
        Chosen(*([Window(text, shown[text][:, place].tolist()) for text in part] for part in some))
        for place, some in enumerate(picked)
    ]


def _chunks(
    sae: SAE,
    gather: Callable[[Tensor], Tensor],
    spans: Sequence[tuple[int, int]],
    texts: Sequence[int],
    column: Tensor,
    count: int,
) -> Iterator[tuple[list[int], list[Tensor]]]:
    """The activations of `texts`, many at once: each encoding reads the whole encoder, so a text alone is dear."""
    chunk: list[int] = []
    tokens = 0
    for place, text in enumerate(texts):
        chunk.append(text)
        tokens += spans[text][1] - spans[text][0]
        if tokens < CHUNK and place + 1 < len(texts):
            continue
        rows = torch.cat([torch.arange(*spans[one]) for one in chunk])
        lengths = [spans[one][1] - spans[one][0] for one in chunk]
        yield chunk, list(torch.split(_dense(sae, gather(rows), column, count), lengths))
        chunk, tokens = [], 0


def _dense(sae: SAE, x: Tensor, column: Tensor, count: int) -> Tensor:
    """The activations of the chosen units, float32 `[tokens, units]`."""
    values, indices = (part.cpu() for part in sae.encode(x.to(sae.W_dec.device)))
    place = column[indices]
    dense = torch.zeros((len(x), count + 1))
    dense.scatter_add_(1, place.where(place >= 0, count), values)
    return dense[:, :count]


def _pick(peak: NDArray[np.float32], examples: int, scored: int, seed: list[int]) -> tuple[list[int], ...]:
    """Numbers of the texts: examples, active, silent."""
    ranked = np.argsort(-peak, kind="stable")
    ranked = ranked[peak[ranked] > 0]
    top, rest = ranked[:examples], ranked[examples:]
    even = np.unique(np.linspace(0, max(0, len(rest) - 1), min(scored, len(rest))).round().astype(int)).tolist()
    silent = np.flatnonzero(peak == 0)
    drawn = np.random.default_rng(seed).permutation(silent)[:scored]
    return top.tolist(), [int(rest[i]) for i in even], drawn.tolist()
