"""Where features fire: histograms of their activations and the texts in which they are largest, in bounded memory."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from babelscope.sae.autoencoder import SAE
from babelscope.sae.cache import CachedSAE

BINS = 24


class Example(NamedTuple):
    """A text in which a feature fires.

    Attributes
    ----------
    feature: number of the feature.
    place: 0 is the text with the largest activation.
    text: number of the text.
    activations: one per token of the text, float32 `[longest]`, 0 behind its end.
    """

    feature: int
    place: int
    text: int
    activations: Tensor


class _Best:
    """Texts of largest activation: `value` and `text` `[kept, features]`, `tokens` `[kept, features, longest]`."""

    def __init__(self, kept: int, features: int, longest: int, device: torch.device) -> None:
        self.value = torch.zeros((kept, features), device=device)
        self.text = torch.full((kept, features), -1, device=device)
        self.tokens = torch.zeros((kept, features, longest), device=device)

    def merge(self, peak: Tensor, text: Tensor, dense: Tensor, start: Tensor, length: Tensor) -> None:
        """Take in texts with larger numbers than any before.

        Parameters
        ----------
        peak: largest activation of each feature in each text, float32 `[texts, features]`.
        text, start, length: each text's number, first row in `dense` and rows, int64 `[texts]`.
        dense: every activation, float32 `[rows, features]`.
        """
        kept, longest = len(self.value), self.tokens.shape[-1]
        # Stable: of two texts with the same activation (they may begin alike) the one with the smaller number stays.
        value, order = torch.cat([self.value, peak]).sort(dim=0, descending=True, stable=True)
        self.value, order = value[:kept], order[:kept]
        numbers = torch.cat([self.text, text.unsqueeze(1).expand_as(peak)])
        self.text = numbers.gather(0, order).where(self.value > 0, -1)
        if not longest:
            return
        old = order.clamp(max=kept - 1).unsqueeze(-1).expand_as(self.tokens)
        self.tokens = self.tokens.gather(0, old)
        place, feature = ((order >= kept) & (self.value > 0)).nonzero(as_tuple=True)
        new = order[place, feature] - kept
        offset = torch.arange(longest, device=dense.device)
        row = (start[new].unsqueeze(1) + offset).clamp(max=len(dense) - 1)
        within = offset < length[new].unsqueeze(1)
        self.tokens[place, feature] = dense[row, feature.unsqueeze(1)].where(within, 0.0)


class Firings:
    """Collects, of some latents of one SAE, histograms and texts of largest activation.

    Memory: `texts * longest` numbers per feature and side, and one chunk's activations of all features.

    Parameters
    ----------
    sae: the dictionary.
    units: numbers of the latents, int64 `[features]`, none twice.
    owns: bool `[features, languages]`, which languages are a feature's own.
    largest: the top of each feature's histogram, float32 `[features]`, > 0.
    texts: how many texts to keep of a feature's own languages, and of the others.
    held_out: how many held-out texts of its own languages.
    longest: tokens of a text that are kept.

    Attributes
    ----------
    histogram: tokens of the training split by activation, int64 `[2, features, BINS]`: own languages, others. The bins
        are equally wide, from 0 to `largest`.
    """

    def __init__(
        self,
        sae: SAE | CachedSAE,
        units: Tensor,
        owns: Tensor,
        largest: Tensor,
        *,
        texts: int,
        held_out: int,
        longest: int,
    ) -> None:
        device = sae.b_dec.device
        self.sae, self.features = sae, len(units)
        self.owns, self.largest = owns.to(device), largest.to(device)
        self.number = torch.full((sae.latents,), -1, device=device)
        self.number[units.to(device)] = torch.arange(len(units), device=device)
        self.histogram = torch.zeros((2, len(units), BINS), dtype=torch.int64, device=device)
        self._best = {
            "own": _Best(texts, len(units), longest, device),
            "other": _Best(texts, len(units), longest, device),
            "held_out": _Best(held_out, len(units), 0, device),
        }

    def add(self, x: Tensor, text: Tensor, language: Tensor, held_out: Tensor) -> None:
        """Look at a chunk that holds whole texts, whose numbers are larger than those of any chunk before.

        Parameters
        ----------
        x: activations of the hookpoint, `[tokens, d]`.
        text: number of each token's text, int64 `[tokens]`, ascending.
        language: language code of each token, int64 `[tokens]`.
        held_out: bool `[tokens]`.
        """
        if not len(x):
            return
        device = self.largest.device
        text, language, held_out = (part.to(device) for part in (text, language, held_out))
        values, indices = self.sae.encode(x.to(device))
        feature = self.number[indices]
        row, column = ((values > 0) & (feature >= 0)).nonzero(as_tuple=True)
        value, feature = values[row, column], feature[row, column]
        self._count(value, feature, language[row], held_out[row])

        numbers, owner, length = torch.unique_consecutive(text, return_inverse=True, return_counts=True)
        start = length.cumsum(0) - length
        dense = torch.zeros((len(x), self.features), device=device)
        dense[row, feature] = value
        peak = torch.zeros((len(numbers), self.features), device=device)
        peak.scatter_reduce_(0, owner.unsqueeze(1).expand_as(dense), dense, "amax")
        own = self.owns[:, language[start]].T
        out = held_out[start].unsqueeze(1)
        for name, among in (("own", own & ~out), ("other", ~own & ~out), ("held_out", own & out)):
            self._best[name].merge(peak.where(among, 0.0), numbers, dense, start, length)

    def _count(self, value: Tensor, feature: Tensor, language: Tensor, held_out: Tensor) -> None:
        bins = (value / self.largest[feature] * BINS).long().clamp(0, BINS - 1)
        side = (~self.owns[feature, language]).long()
        place = ((side * self.features + feature) * BINS + bins)[~held_out]
        self.histogram += torch.bincount(place, minlength=self.histogram.numel()).view_as(self.histogram)

    def texts(self, side: str) -> list[list[int]]:
        """By feature, numbers of its `own`, `other` or `held_out` (own, held-out) texts, the most active one first."""
        return [[number for number in numbers if number >= 0] for numbers in self._best[side].text.T.tolist()]

    def examples(self, side: str) -> Iterator[Example]:
        """By feature and place: texts of the training split, of the feature's languages (`own`) or not (`other`)."""
        tokens = self._best[side].tokens.cpu()
        for feature, numbers in enumerate(self.texts(side)):
            for place, number in enumerate(numbers):
                yield Example(feature, place, number, tokens[place, feature])
