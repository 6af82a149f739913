"""Texts and histograms of features, collected in one pass over the texts that the browser reads."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from babelscope.features.examples import Features

BINS = 24
# The lower quarters of a feature's activations from which a text is sampled, as shares of the largest: [low, high).
BANDS = ((0.5, 0.75), (0.25, 0.5), (0.0, 0.25))


class Example(NamedTuple):
    """A text in which a feature fires."""

    feature: int
    place: int  # from 0
    text: int
    activations: Tensor  # float32 [longest], one per token of the text, padded with zeros


class _Best:
    """The texts of largest value: `value` and `text` `[kept, features]`, `tokens` `[kept, features, longest]`."""

    def __init__(self, kept: int, features: int, longest: int, device: torch.device) -> None:
        self.value = torch.zeros((kept, features), device=device)
        self.text = torch.full((kept, features), -1, device=device)
        self.tokens = torch.zeros((kept, features, longest), device=device)

    def merge(self, peak: Tensor, text: Tensor, dense: Tensor, start: Tensor, length: Tensor) -> None:
        """Add texts whose numbers are larger than all before.

        `peak`: by what texts are chosen, such as the largest activation of each feature in each, `[texts, features]`;
        a text with 0 is left out. `text`, `start`, `length`: each
        text's number, first row in `dense` and rows, int64 `[texts]`. `dense`: every activation, `[rows, features]`.
        """
        kept, longest = len(self.value), self.tokens.shape[-1]
        # Stable: of texts with the same activation (they may begin alike), those with smaller numbers are kept.
        value, order = torch.cat([self.value, peak]).sort(dim=0, descending=True, stable=True)
        self.value, order = value[:kept], order[:kept]
        numbers = torch.cat([self.text, text.unsqueeze(1).expand_as(peak)])
        self.text = numbers.gather(0, order).where(self.value > 0, -1)
        old = order.clamp(max=kept - 1).unsqueeze(-1).expand_as(self.tokens)
        self.tokens = self.tokens.gather(0, old)
        place, feature = ((order >= kept) & (self.value > 0)).nonzero(as_tuple=True)
        new = order[place, feature] - kept
        offset = torch.arange(longest, device=dense.device)
        row = (start[new].unsqueeze(1) + offset).clamp(max=len(dense) - 1)
        within = offset < length[new].unsqueeze(1)
        self.tokens[place, feature] = dense[row, feature.unsqueeze(1)].where(within, 0.0)


class Firings:
    """Collects histograms and texts of features, in one pass.

    Memory: `(2 * texts + len(BANDS)) * longest` numbers per feature, and the activations of all features on one chunk.

    Parameters
    ----------
    owns: bool `[features, languages]`, the own languages of every feature.
    largest: the upper end of each feature's histogram, float32 `[features]`, > 0.
    texts: number of most active texts to keep for a feature, in its own languages and in the others each.
    longest: tokens to keep of a text.

    Attributes
    ----------
    histogram: tokens by activation, int64 `[2, features, BINS]`: own languages, others. The bins are equally wide, from
        0 to `largest`.
    """

    def __init__(self, features: Features, owns: Tensor, largest: Tensor, *, texts: int, longest: int) -> None:
        self.features, device = features, features.device
        self.owns, self.largest = owns.to(device), largest.to(device)
        self.histogram = torch.zeros((2, features.count, BINS), dtype=torch.int64, device=device)
        self._best = {side: _Best(texts, features.count, longest, device) for side in ("own", "other")}
        self._sampled = [_Best(1, features.count, longest, device) for _ in BANDS]

    def add(self, x: Tensor, text: Tensor, language: Tensor) -> None:
        """Add a chunk of whole texts, whose numbers are larger than those of all chunks before.

        `x`: activations of the hookpoint, `[tokens, d]`. For each token, `[tokens]`: `text`, the number of its text
        (int64, ascending), and `language`, the code of its language (int64).
        """
        if not len(x):
            return
        text, language = text.to(self.features.device), language.to(self.features.device)
        dense = self.features.activations(x)
        self._count(dense, language)
        numbers, owner, length = torch.unique_consecutive(text, return_inverse=True, return_counts=True)
        start = length.cumsum(0) - length
        peak = dense.new_zeros((len(numbers), dense.shape[1]))
        peak.scatter_reduce_(0, owner.unsqueeze(1).expand_as(dense), dense, "amax")
        own = self.owns[:, language[start]].T
        for side, mask in (("own", own), ("other", ~own)):
            self._best[side].merge(peak.where(mask, 0.0), numbers, dense, start, length)
        # Of a band's texts one is drawn by Knuth's multiplicative hash of its number (the upper 24 bits, which float32
        # holds exactly), so that neither the chunks nor the device change it.
        drawn = ((numbers * 2654435761 % 2**32 >> 8) + 1).float().unsqueeze(1)
        share = peak / self.largest
        for best, (low, high) in zip(self._sampled, BANDS, strict=True):
            inside = own & (share > low) & (share < high)
            best.merge(drawn.where(inside, 0.0), numbers, dense, start, length)

    def _count(self, dense: Tensor, language: Tensor) -> None:
        row, feature = dense.nonzero(as_tuple=True)
        bins = (dense[row, feature] / self.largest[feature] * BINS).long().clamp(0, BINS - 1)
        side = (~self.owns[feature, language[row]]).long()
        index = (side * self.features.count + feature) * BINS + bins
        self.histogram += torch.bincount(index, minlength=self.histogram.numel()).view_as(self.histogram)

    def examples(self, side: str) -> Iterator[Example]:
        """Texts by feature and place.

        `side`: `own` or `other`, the most active texts in the feature's languages or in others, by activation; or
        `sample`, a text in its languages from every band of `BANDS`, unless it is one of the most active.
        """
        kept = [self._best[side]] if side != "sample" else self._sampled
        texts, tokens = torch.cat([one.text for one in kept]).T.tolist(), torch.cat([one.tokens for one in kept]).cpu()
        shown = self._best["own"].text.T.tolist() if side == "sample" else [[] for _ in texts]
        for feature, numbers in enumerate(texts):
            rows = [row for row, number in enumerate(numbers) if number >= 0 and number not in shown[feature]]
            for place, row in enumerate(rows):
                yield Example(feature, place, numbers[row], tokens[row, feature])
