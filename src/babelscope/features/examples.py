"""The activations of some features of an SAE, and texts in which the features fire."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from babelscope.activations.rows import read_rows
from babelscope.core.errors import UserError
from babelscope.core.files import read_table
from babelscope.core.paths import Paths
from babelscope.features.counter import whole_texts
from babelscope.sae.autoencoder import SAE
from babelscope.sae.cache import CachedSAE

# Tokens that `choose` encodes at once, which bounds the memory.
CHUNK = 8192


def read_texts(paths: Paths, languages: Sequence[str]) -> pl.DataFrame:
    """Of the texts in `languages`: `text_id`, `language`, `split`, `text`, in the order of the stored activations.

    Raises
    ------
    UserError: the corpus lacks one of the texts.
    """
    stored = read_rows(paths, languages, ["text_id"]).unique(maintain_order=True)
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
