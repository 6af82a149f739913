"""Whether another SAE of the same activations finds latents again: their partners, and the overlap of firings.

SAEs that differ in their seed alone share only some of their latents (Paulo & Belrose 2025, arXiv 2501.16615). The sets
of a language's latents can agree even if their latents do not (arXiv 2606.12138).
"""

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import min_weight_full_bipartite_matching
from torch import Tensor
from torch.nn import functional

from babelscope.models.matmul import linear
from babelscope.sae.autoencoder import chunk_rows

# Cosines that `assign` holds at most (12 bytes each), and above that number, the nearest latents that it considers.
_DENSE, _NEAREST = 2**26, 32
# A random latent is drawn from so many whose numbers of tokens are nearest to the number wanted.
_NEAR = 20


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


@torch.no_grad()
def assign(decoder: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Pair latents one to one so that the sum of their decoder cosines is largest (the Hungarian method).

    Memory: n x m cosines up to `_DENSE` of them. Above that number only the `_NEAREST` partners of each latent count,
    and a latent may stay alone, which adds 0 to the sum.

    Parameters
    ----------
    decoder, other: float32 [n, d] and [m, d], rows of any norm.

    Returns
    -------
    The latents in `decoder` and in `other` of every pair, int64 [pairs] each.
    """
    rows, others = functional.normalize(decoder), functional.normalize(other)
    n, m = len(rows), len(others)
    if n * m <= _DENSE:
        pairs = linear_sum_assignment(linear(rows, others).cpu().numpy(), maximize=True)
    else:
        chunks = torch.split(rows, chunk_rows(m, rows.device))
        near = [linear(chunk, others).topk(min(_NEAREST, m)) for chunk in chunks]
        cosine, column = (torch.cat([found[i] for found in near]).cpu().numpy() for i in (0, 1))
        # Each latent also has a column of its own, with cosine 0. The solver wants the smallest sum of weights above 0.
        cosine, column = np.column_stack([cosine, np.zeros(n)]), np.column_stack([column, m + np.arange(n)])
        row = np.arange(n).repeat(column.shape[1])
        weights = coo_matrix((2.0 - cosine.ravel(), (row, column.ravel())), shape=(n, m + n)).tocsr()
        row, chosen = min_weight_full_bipartite_matching(weights)
        pairs = row[chosen < m], chosen[chosen < m]
    first, second = (torch.as_tensor(part, dtype=torch.int64, device=decoder.device) for part in pairs)
    return first, second


@torch.no_grad()
def match(latents: tuple[Tensor, Tensor], others: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Decoder and encoder cosine of every latent with its one-to-one partner (`assign`).

    If a few directions hold most of the variance of the activations, cosines are high by chance, too: compare them with
    those of `random_latents`.

    Parameters
    ----------
    latents, others: decoder rows float32 [n, d] and encoder rows float32 [n, d_in] of one SAE and of the other.

    Returns
    -------
    Two float32 [n] in -1..1; nan for a latent without a partner.
    """
    first, second = assign(latents[0], others[0])
    found = torch.full((2, len(latents[0])), torch.nan, device=latents[0].device)
    for cosine, rows, other in zip(found, latents, others, strict=True):
        cosine[first] = functional.cosine_similarity(rows[first], other[second]).clamp(-1, 1)
    return found[0], found[1]


@torch.no_grad()
def random_latents(latents: tuple[Tensor, Tensor], seed: int) -> tuple[Tensor, Tensor]:
    """As many random latents, normally distributed, with the mean and the covariance of the given ones.

    Decoder and encoder rows are drawn together, so that the two of a random latent are related as those of a real one.

    Parameters
    ----------
    latents: decoder rows float32 [n, d] and encoder rows float32 [n, d_in], of any norm.
    """
    rows = torch.cat([functional.normalize(part) for part in latents], dim=1)
    mean, n = rows.mean(0), len(rows)
    generator, offsets = torch.Generator().manual_seed(seed), (rows - mean) / n**0.5
    chunks = torch.split(rows, chunk_rows(n, rows.device))
    mixed = [torch.randn(len(chunk), n, generator=generator).to(rows.device) @ offsets + mean for chunk in chunks]
    decoder, encoder = torch.split(torch.cat(mixed), [part.shape[1] for part in latents], dim=1)
    return decoder, encoder


def write_cosine(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> float:
    """Cosine of what two sets of latents write on average, `sum_u z_u W_dec[u]`.

    Parameters
    ----------
    first, second: decoder rows [k, d] and the sum of the activations of each row's latent over the same tokens [k].
    """
    one, other = (sums.double() @ rows.double() for rows, sums in (first, second))
    return float(functional.cosine_similarity(one, other, dim=0))


def subspace_overlap(rows: Tensor, others: Tensor) -> float:
    """Mean squared cosine of the principal angles between the spans of two sets of as many rows [k, d], in 0..1."""
    one, other = (torch.linalg.qr(part.T.double()).Q for part in (rows, others))
    return float((one.T @ other).square().sum() / one.shape[1])


def random_sets(
    tokens: NDArray[np.float64], wanted: NDArray[np.float64], draws: int, random: np.random.Generator
) -> NDArray[np.int64]:
    """Random latents that fire about as often: for each number wanted, one of the `_NEAR` nearest that are left.

    Parameters
    ----------
    tokens: on how many tokens each latent fires, above 0 [p]; their logarithms are compared.
    wanted: the numbers of tokens [k], k at most p.

    Returns
    -------
    Positions in `tokens` [draws, k], distinct within a draw.
    """
    drawn = np.empty((draws, len(wanted)), dtype=np.int64)
    is_left = np.ones((draws, len(tokens)), dtype=bool)
    for column, number in enumerate(wanted):
        near = np.abs(np.log(tokens / number)).argsort(kind="stable")[: _NEAR + column]
        free = is_left[:, near]
        key = np.where(free & (free.cumsum(axis=1) <= _NEAR), random.random(free.shape), -1.0)
        drawn[:, column] = near[key.argmax(axis=1)]
        is_left[np.arange(draws), drawn[:, column]] = False
    return drawn
