"""How well an SAE reconstructs held-out activations."""

from typing import NamedTuple

import torch
from torch import Tensor

from babelscope.activations.store import ActivationStore
from babelscope.sae.autoencoder import SAE

_CHUNK = 8192


class Quality(NamedTuple):
    """Figures of one SAE on one set of rows.

    Attributes
    ----------
    fvu: fraction of variance unexplained, sum ||x - x_hat||^2 / sum ||x - mean||^2, the mean taken over all rows.
    l0: mean number of active latents per row.
    dead_share: share of the latents that fire on no row.
    fvu_of: the same fraction over the rows of each group, around that group's own mean (nan for a group without rows).
    """

    fvu: float
    l0: float
    dead_share: float
    fvu_of: list[float]


@torch.no_grad()
def quality(sae: SAE, store: ActivationStore, rows: Tensor, group: Tensor, groups: int) -> Quality:
    """Measure an SAE on the given rows of a store.

    Parameters
    ----------
    sae: on any device, in the units of the store.
    store: the activations.
    rows: int64 [m], which of its rows.
    group: int64 [m] in 0..groups-1, e.g. the language of every row.
    groups: how many groups there are.
    """
    device = sae.b_dec.device
    counts = torch.bincount(group, minlength=groups).double()
    sums = torch.zeros(groups, store.d, dtype=torch.float64)
    squares, errors = torch.zeros(groups, dtype=torch.float64), torch.zeros(groups, dtype=torch.float64)
    fired = torch.zeros(sae.latents, dtype=torch.bool, device=device)
    active = 0
    for first in range(0, len(rows), _CHUNK):
        which = group[first : first + _CHUNK]
        x = store.gather(rows[first : first + _CHUNK]).to(device).float()
        values, indices = sae.encode(x)
        error = (sae.decode(values, indices) - x).square().sum(1, dtype=torch.float64)
        fired[indices[values > 0]] = True
        active += int((values > 0).sum())
        sums.index_add_(0, which, x.double().cpu())
        squares.index_add_(0, which, x.square().sum(1, dtype=torch.float64).cpu())
        errors.index_add_(0, which, error.cpu())
    total = squares.sum() - sums.sum(0).square().sum() / counts.sum()
    within = squares - sums.square().sum(1) / counts
    return Quality(
        fvu=float(errors.sum() / total),
        l0=active / max(1, len(rows)),
        dead_share=1 - int(fired.sum()) / sae.latents,
        fvu_of=(errors / within).tolist(),
    )
