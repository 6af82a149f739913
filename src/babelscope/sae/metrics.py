"""How well an SAE reconstructs held-out activations."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from babelscope.activations.store import ActivationStore
from babelscope.core.errors import UserError
from babelscope.sae.autoencoder import SAE

_CHUNK = 8192


class Quality(NamedTuple):
    """Figures of one SAE on a set of rows.

    Attributes
    ----------
    fvu: fraction of variance unexplained, sum ||x - x_hat||^2 / sum ||x - mean||^2, with the mean over all rows.
    l0: mean number of active latents per row.
    dead_share: share of the latents that fire on no row.
    fvu_of: FVU of the rows of each group, around the group's mean (nan for a group without rows).
    l0_of: mean number of active latents per row of each group (nan for a group without rows).
    """

    fvu: float
    l0: float
    dead_share: float
    fvu_of: list[float]
    l0_of: list[float]

    def figures(self, groups: Sequence[str]) -> dict[str, float]:
        """Flat numbers for a metrics file: `fvu`, `l0`, `dead_share`, `fvu/<group>`, `l0/<group>`.

        A group without rows has no figures, and one whose rows are all the same has no FVU.

        Raises
        ------
        UserError: the SAE's reconstruction is not a number, or there is no variance to explain.
        """
        if math.isinf(self.fvu):
            raise UserError("params.yaml: corpus.eval_tokens: all held-out tokens have the same activations; raise it")
        if math.isnan(self.fvu):
            raise UserError("params.yaml: train.learning_rate: the training diverged; lower it")
        by_group = {
            f"{name}/{group}": value
            for name, values in (("fvu", self.fvu_of), ("l0", self.l0_of))
            for group, value in zip(groups, values, strict=True)
        }
        measured = {key: value for key, value in by_group.items() if math.isfinite(value)}
        return {"fvu": self.fvu, "l0": self.l0, "dead_share": self.dead_share, **measured}


class QualitySums:
    """Accumulates the sums for `Quality` chunk by chunk, in memory of groups x d for any number of rows.

    Parameters
    ----------
    sae: an SAE on any device, in the units of the activations.
    groups: number of groups, e.g. languages.
    """

    def __init__(self, sae: SAE, groups: int) -> None:
        self.sae = sae
        self._counts, self._squares, self._errors, self._active = torch.zeros(4, groups, dtype=torch.float64)
        self._sums = torch.zeros(groups, sae.d, dtype=torch.float64)
        self._fired = torch.zeros(sae.latents, dtype=torch.bool, device=sae.b_dec.device)

    @torch.no_grad()
    def add(self, x: Tensor, y: Tensor | None, group: Tensor) -> None:
        """Add some rows.

        Parameters
        ----------
        x: [rows, d_in], the activations to encode.
        y: [rows, d], the activations to reconstruct (transcoders); None: x.
        group: int64 [rows] in 0..groups-1.
        """
        device = self.sae.b_dec.device
        x = x.to(device).float()
        target = x if y is None else y.to(device).float()
        values, indices = self.sae.encode(x)
        error = (self.sae.reconstruct(x, values, indices) - target).square().sum(1, dtype=torch.float64)
        self._fired[indices[values > 0]] = True
        self._counts += torch.bincount(group, minlength=len(self._counts))
        self._active.index_add_(0, group, (values > 0).sum(1, dtype=torch.float64).cpu())
        # float64: in float32, the square of a mean far from 0 would hide a small variance.
        wide = target.double()
        self._sums.index_add_(0, group, wide.cpu())
        self._squares.index_add_(0, group, wide.square().sum(1).cpu())
        self._errors.index_add_(0, group, error.cpu())

    def result(self) -> Quality:
        """The figures of all rows added so far."""
        rows = self._counts.sum()
        total = self._squares.sum() - self._sums.sum(0).square().sum() / rows
        within = self._squares - self._sums.square().sum(1) / self._counts
        return Quality(
            fvu=float(self._errors.sum() / total),
            l0=float(self._active.sum()) / max(1, int(rows)),
            dead_share=1 - int(self._fired.sum()) / self.sae.latents,
            fvu_of=(self._errors / within).tolist(),
            l0_of=(self._active / self._counts).tolist(),
        )


def quality(
    sae: SAE, store: ActivationStore, rows: Tensor, group: Tensor, groups: int, inputs: ActivationStore | None = None
) -> Quality:
    """Measure an SAE on the given rows of a store.

    Parameters
    ----------
    sae: an SAE on any device, in the units of the store.
    store: the activations.
    rows: int64 [m], the rows of the store to measure on.
    group: int64 [m] in 0..groups-1, e.g. the language of every row.
    groups: number of groups.
    inputs: the activations to encode (transcoders), row for row; None: those of `store`.
    """
    sums = QualitySums(sae, groups)
    for first in range(0, len(rows), _CHUNK):
        chunk = rows[first : first + _CHUNK]
        target = store.gather(chunk)
        x, y = (target, None) if inputs is None else (inputs.gather(chunk), target)
        sums.add(x, y, group[first : first + _CHUNK])
    return sums.result()
