"""Histograms of the activations of an SAE's features, and texts in which the features fire."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from babelscope.core.errors import UserError
from babelscope.core.files import read_table
from babelscope.core.paths import Paths
from babelscope.features.counter import whole_texts
from babelscope.sae.autoencoder import SAE
from babelscope.sae.cache import CachedSAE

BINS = 24
# Tokens that `choose` encodes at once, which bounds the memory.
CHUNK = 8192


def read_texts(paths: Paths) -> pl.DataFrame:
    """`text_id`, `language`, `split`, `text`, in the order of the stored activations.

    Raises
    ------
    UserError: the corpus lacks one of the texts.
    """
    stored = read_table(paths.tokens, columns=["text_id"]).unique(maintain_order=True)
    texts = stored.join(read_table(paths.texts), on="text_id", how="left", maintain_order="left")
    if texts["text"].null_count():
        raise UserError(f"{paths.tokens}: holds texts that {paths.texts} lacks; run `dvc repro extract`")
    return texts.select("text_id", "language", "split", "text")


class Features:
    """Some latents of `sae`, whose numbers are `units` (int64 `[features]`, without duplicates)."""

    def __init__(self, sae: SAE | CachedSAE, units: Tensor) -> None:
        self.sae, self.count, self.device = sae, len(units), sae.b_dec.device
        self.number = torch.full((sae.latents,), -1, device=self.device)
        self.number[units.to(self.device)] = torch.arange(len(units), device=self.device)

    def reads(self, hookpoint: str) -> str:
        """The hookpoint whose activations the SAE encodes; for a transcoder, the input of its module."""
        return self.sae.input_name(hookpoint)

    def activations(self, x: Tensor) -> Tensor:
        """Activations of the features on `x` `[tokens, d]`: float32 `[tokens, features]`, on the SAE's device."""
        values, indices = self.sae.encode(x.to(self.device))
        feature = self.number[indices]
        row, column = ((values > 0) & (feature >= 0)).nonzero(as_tuple=True)
        dense = torch.zeros((len(x), self.count), device=self.device)
        dense[row, feature[row, column]] = values[row, column].float()
        return dense


class Example(NamedTuple):
    """A text in which a feature fires."""

    feature: int
    place: int  # 0 is the text with the largest activation
    text: int
    activations: Tensor  # float32 [longest], one per token of the text, padded with zeros


class _Best:
    """The most active texts: `value` and `text` `[kept, features]`, `tokens` `[kept, features, longest]`."""

    def __init__(self, kept: int, features: int, longest: int, device: torch.device) -> None:
        self.value = torch.zeros((kept, features), device=device)
        self.text = torch.full((kept, features), -1, device=device)
        self.tokens = torch.zeros((kept, features, longest), device=device)

    def merge(self, peak: Tensor, text: Tensor, dense: Tensor, start: Tensor, length: Tensor) -> None:
        """Add texts whose numbers are larger than all before.

        `peak`: largest activation of each feature in each text, `[texts, features]`. `text`, `start`, `length`: each
        text's number, first row in `dense` and rows, int64 `[texts]`. `dense`: every activation, `[rows, features]`.
        """
        kept, longest = len(self.value), self.tokens.shape[-1]
        # Stable: of texts with the same activation (they may begin alike), those with smaller numbers are kept.
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
    """Collects histograms and the most active texts of features, in one pass.

    Memory: `texts * longest` numbers per feature and side, and the activations of all features on one chunk.

    Parameters
    ----------
    owns: bool `[features, languages]`, the own languages of every feature.
    largest: the upper end of each feature's histogram, float32 `[features]`, > 0.
    texts: number of texts to keep for a feature, in its own languages and in the others each.
    held_out: number of held-out texts to keep for a feature, in its own languages.
    longest: tokens to keep of a text.

    Attributes
    ----------
    histogram: tokens of the training split by activation, int64 `[2, features, BINS]`: own languages, others. The bins
        are equally wide, from 0 to `largest`.
    """

    def __init__(
        self, features: Features, owns: Tensor, largest: Tensor, *, texts: int, held_out: int, longest: int
    ) -> None:
        self.features, device = features, features.device
        self.owns, self.largest = owns.to(device), largest.to(device)
        self.histogram = torch.zeros((2, features.count, BINS), dtype=torch.int64, device=device)
        sizes = {"own": (texts, longest), "other": (texts, longest), "held_out": (held_out, 0)}
        self._best = {side: _Best(kept, features.count, size, device) for side, (kept, size) in sizes.items()}

    def add(self, x: Tensor, text: Tensor, language: Tensor, held_out: Tensor) -> None:
        """Add a chunk of whole texts, whose numbers are larger than those of all chunks before.

        `x`: activations of the hookpoint, `[tokens, d]`. For each token, `[tokens]`: `text`, the number of its text
        (int64, ascending); `language`, the code of its language (int64); `held_out` (bool).
        """
        if not len(x):
            return
        text, language, held_out = (part.to(self.features.device) for part in (text, language, held_out))
        dense = self.features.activations(x)
        self._count(dense, language, held_out)
        numbers, owner, length = torch.unique_consecutive(text, return_inverse=True, return_counts=True)
        start = length.cumsum(0) - length
        peak = dense.new_zeros((len(numbers), dense.shape[1]))
        peak.scatter_reduce_(0, owner.unsqueeze(1).expand_as(dense), dense, "amax")
        own, out = self.owns[:, language[start]].T, held_out[start].unsqueeze(1)
        for side, mask in (("own", own & ~out), ("other", ~own & ~out), ("held_out", own & out)):
            self._best[side].merge(peak.where(mask, 0.0), numbers, dense, start, length)

    def _count(self, dense: Tensor, language: Tensor, held_out: Tensor) -> None:
        row, feature = (dense * ~held_out.unsqueeze(1)).nonzero(as_tuple=True)
        bins = (dense[row, feature] / self.largest[feature] * BINS).long().clamp(0, BINS - 1)
        side = (~self.owns[feature, language[row]]).long()
        index = (side * self.features.count + feature) * BINS + bins
        self.histogram += torch.bincount(index, minlength=self.histogram.numel()).view_as(self.histogram)

    def texts(self, side: str) -> list[list[int]]:
        """By feature, numbers of its `own`, `other` or `held_out` (own, held-out) texts, the most active first."""
        return [[number for number in numbers if number >= 0] for numbers in self._best[side].text.T.tolist()]

    def examples(self, side: str) -> Iterator[Example]:
        """Training texts by feature and place, in the feature's languages (`own`) or in others (`other`)."""
        tokens = self._best[side].tokens.cpu()
        for feature, numbers in enumerate(self.texts(side)):
            for place, number in enumerate(numbers):
                yield Example(feature, place, number, tokens[place, feature])


class Shown(NamedTuple):
    """The number of a text, and one feature's activation on every token (0 if it does not fire)."""

    text: int
    activations: list[float]


class Chosen(NamedTuple):
    """The texts of one feature."""

    examples: list[Shown]  # to explain it
    active: list[Shown]  # to test the explanation: texts in which it fires
    silent: list[Shown]  # to test the explanation: texts in which it does not fire


@torch.inference_mode()
def choose(
    features: Features,
    gather: Callable[[Tensor], Tensor],
    text: Tensor,
    examples: int,
    scored: int,
    seeds: list[list[int]],
    advance: Callable[[int], None] = lambda tokens: None,
) -> list[Chosen]:
    """Choose texts for every feature.

    The examples are the texts in which it is most active. The test texts (Paulo et al. 2024, arXiv 2410.13928) are
    further texts in which it fires, evenly spaced by rank of its largest activation, and random texts in which it never
    fires. All texts are read once, and the chosen ones a second time.

    Parameters
    ----------
    gather: rows (int64) -> activations `[rows, d]`.
    text: number of each row's text, int64 `[rows]`, ascending from 0.
    examples, scored: number of examples, and of test texts of each kind (fewer if there are not enough).
    seeds: of the draws, for each feature.
    advance: called with the tokens read since the last call.
    """

    def read(rows: Tensor) -> Iterator[Tensor]:
        """The activations `[tokens, features]` of each text in `rows`; many texts are encoded at once."""
        for start, end in whole_texts(text[rows], CHUNK):
            part = rows[start:end]
            lengths = torch.unique_consecutive(text[part], return_counts=True)[1]
            yield from torch.split(features.activations(gather(part)).cpu(), lengths.tolist())

    peaks = []
    for dense in read(torch.arange(len(text))):
        peaks.append(dense.amax(0))
        advance(len(dense))
    peak = torch.stack(peaks).T.numpy() if peaks else np.zeros((features.count, 0), dtype=np.float32)
    picked = [_pick(values, examples, scored, seed) for values, seed in zip(peak, seeds, strict=True)]
    needed = sorted({number for sides in picked for numbers in sides for number in numbers})
    rows = torch.isin(text, torch.tensor(needed, dtype=torch.int64)).nonzero().squeeze(1)
    shown = dict(zip(needed, read(rows), strict=True))
    return [
        Chosen(*([Shown(number, shown[number][:, feature].tolist()) for number in numbers] for numbers in sides))
        for feature, sides in enumerate(picked)
    ]


def _pick(peak: NDArray[np.float32], examples: int, scored: int, seed: list[int]) -> tuple[list[int], ...]:
    """Numbers of the texts: examples, active, silent."""
    ranked = np.argsort(-peak, kind="stable")
    ranked = ranked[peak[ranked] > 0]
    top, rest = ranked[:examples], ranked[examples:]
    even = np.unique(np.linspace(0, max(0, len(rest) - 1), min(scored, len(rest))).round().astype(int)).tolist()
    silent = np.flatnonzero(peak == 0)
    drawn = np.random.default_rng(seed).permutation(silent)[:scored]
    return top.tolist(), [int(rest[i]) for i in even], drawn.tolist()
