"""Whether another SAE of the same activations finds latents again: their partners, and the overlap of firings.

SAEs that differ in their seed alone share only some of their latents (Paulo & Belrose 2025, arXiv 2501.16615).
"""

import polars as pl
import torch
from torch import Tensor

from babelscope.models.matmul import linear
from babelscope.sae.autoencoder import chunk_rows


@torch.no_grad()
def partners(decoder: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """The best partner of every latent by decoder cosine (max cosine similarity; Sharkey et al. 2022).

    One latent may be the partner of several. Memory: m scores for each row of a chunk, never n x m.

    Parameters
    ----------
    decoder: float32 [n, d], `W_dec` of the SAE whose latents need partners; rows of any norm (0: cosine 0 with all).
    other: float32 [m, d], `W_dec` of the SAE of the partners.

    Returns
    -------
    cosine: float32 [n] in -1..1, of the best partner.
    partner: int64 [n], its latent in `other`.
    """
    smallest = torch.finfo(decoder.dtype).tiny
    norm = other.norm(dim=1).clamp_min_(smallest)
    cosines, found = [], []
    for rows in torch.split(decoder, chunk_rows(len(other), decoder.device)):
        best = linear(rows, other).div_(norm).max(dim=1)
        cosines.append((best.values / rows.norm(dim=1).clamp_min_(smallest)).clamp_(-1, 1))
        found.append(best.indices)
    return torch.cat(cosines), torch.cat(found)


class Overlap:
    """Computes, chunk by chunk, the Jaccard index of the tokens on which a latent and its partner fire.

    J = |A & B| / |A | B|, with A the tokens on which the latent of the first SAE fires (activation > 0), and B those of
    its partner in the second. Memory: three numbers per latent, whatever the number of tokens.

    Parameters
    ----------
    partner: int64 [n], the partner in the second SAE of every latent of the first.
    latents: width m of the second SAE.
    """

    def __init__(self, partner: Tensor, latents: int) -> None:
        self.partner, self.latents = partner, latents
        self._first, self._both = torch.zeros_like(partner), torch.zeros_like(partner)
        self._second = partner.new_zeros(latents)

    def add(self, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> None:
        """Add some tokens.

        Parameters
        ----------
        first, second: values and indices from `SAE.encode` for the same tokens, [tokens, q] each (q may differ).
        """
        token, unit = _fired(*first)
        other_token, other_unit = _fired(*second)
        both = torch.isin(token * self.latents + self.partner[unit], other_token * self.latents + other_unit)
        self._first += torch.bincount(unit, minlength=len(self._first))
        self._both += torch.bincount(unit[both], minlength=len(self._both))
        self._second += torch.bincount(other_unit, minlength=self.latents)

    def result(self) -> Tensor:
        """The index of every latent of the first SAE, float64 [n] in 0..1; nan if neither of the two fires."""
        return self._both.double() / (self._first + self._second[self.partner] - self._both)


def _fired(values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Token and latent of every firing."""
    token, column = (values > 0).nonzero(as_tuple=True)
    return token, indices[token, column]


def with_baseline(features: pl.DataFrame, latents: pl.DataFrame, cosine: float) -> pl.DataFrame:
    """Each feature's partner, and as a baseline the partners of other latents that fire at least as often.

    Latents that fire often are learned from more tokens, so a feature is compared with latents that had no fewer.

    Parameters
    ----------
    features: `unit` and any other columns; several rows may name the same unit.
    latents: all of the SAE: `unit`, `tokens` (on which it fires), `partner`, `cosine`, `overlap` (null: neither fires).
    cosine: a latent counts as found again if its best partner has at least this cosine.

    Returns
    -------
    `features`, row for row, with `partner`, `cosine`, `overlap`, and of the baseline `others` (how many latents),
    `others_share` (the share found again), `others_cosine` and `others_overlap` (their means); null if it is empty.
    """
    running = pl.int_range(1, pl.len() + 1, dtype=pl.Int64)
    overlap = pl.col("overlap")
    others = (
        latents.join(features, on="unit", how="anti")
        .sort("tokens", "unit", descending=[True, False])
        .select(
            "tokens",
            others=running,
            others_share=(pl.col("cosine") >= cosine).cast(pl.Int64).cum_sum() / running,
            others_cosine=pl.col("cosine").cum_sum() / running,
            others_overlap=(overlap.fill_null(0.0).cum_sum() / overlap.cum_count()).fill_nan(None),
        )
        # Of latents that fire equally often, the last row includes all.
        .unique("tokens", keep="last", maintain_order=True)
        .sort("tokens")
    )
    return (
        features.with_row_index("_row")
        .join(latents, on="unit", how="left")
        .sort("tokens", "_row")
        .join_asof(others, on="tokens", strategy="forward")
        .sort("_row")
        .drop("_row", "tokens")
    )
