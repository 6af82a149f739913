"""Ways to remove units from a forward pass at one hookpoint, each for many conditions at once.

A condition is a set of units. Only content tokens are changed: the SAE was not trained on the tokenizer's leading
special tokens, whose norms are far from those of all others.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from babelscope.models.matmul import pad_rows
from babelscope.sae.autoencoder import SAE
from babelscope.sae.cache import CachedSAE, SAECache

Units = Sequence[Sequence[int]]


class Intervention(Protocol):
    """A change of the activations at one hookpoint.

    Attributes
    ----------
    active: bool `[conditions]`, whether a condition has units at this hookpoint.
    """

    active: Tensor

    def affected_tokens(self, x: Tensor) -> Tensor:
        """Which rows of `x` `[tokens, d]` each condition would change: bool `[conditions, tokens]`."""

    def change(self, x: Tensor, condition: Tensor) -> Tensor:
        """`x` `[tokens, d]` with row i changed by condition `condition[i]` (int64); same dtype."""


def members(units: Units, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Bool `[conditions, count]`: which of `count` units each condition removes."""
    table = torch.zeros((len(units), count), dtype=torch.bool)
    for row, removed in enumerate(units):
        table[row, torch.tensor(list(removed), dtype=torch.int64)] = True
    return table.to(device)


class FeatureAblation:
    """`x - sum_{u in S} z_u(x) W_dec[u]`, `z_u` the SAE's own activation.

    The SAE's error stays in place, so that removing nothing changes nothing, bit for bit. (This form is ours; Andrylie
    et al. 2025 add a constant vector, see `Additive`.)
    """

    def __init__(self, sae: SAE | CachedSAE, units: Units) -> None:
        device = sae.b_dec.device
        self.sae = sae
        self.active = torch.tensor([len(removed) > 0 for removed in units], dtype=torch.bool, device=device)
        # Pairs (latent, condition that removes it), ascending. A table of conditions x latents would take gigabytes if
        # every feature of a large dictionary is a condition of its own.
        pairs = sorted({(unit, number) for number, removed in enumerate(units) for unit in removed})
        latent, self.condition = torch.tensor(pairs, dtype=torch.int64, device=device).view(-1, 2).T
        self.pair = latent * len(units) + self.condition
        # The pairs of latent i are those from start[i] to start[i + 1].
        self.start = F.pad(torch.bincount(latent, minlength=sae.latents).cumsum(0), (1, 0))

    def affected_tokens(self, x: Tensor) -> Tensor:
        """The tokens on which one of a condition's units fires."""
        values, indices = self._encode(x)
        hit = torch.zeros((len(self.active), len(x)), dtype=torch.bool, device=x.device)
        token, column = (values > 0).nonzero(as_tuple=True)
        first = self.start[indices[token, column]]
        count = self.start[indices[token, column] + 1] - first
        # Repeat each firing for every condition that removes its latent.
        offset = torch.arange(int(count.sum()), device=x.device) - (count.cumsum(0) - count).repeat_interleave(count)
        hit[self.condition[first.repeat_interleave(count) + offset], token.repeat_interleave(count)] = True
        return hit

    def change(self, x: Tensor, condition: Tensor) -> Tensor:
        """Subtract the units' part of the reconstruction."""
        values, indices = self._encode(x)
        if not len(self.pair):
            return x
        wanted = indices * len(self.active) + condition.unsqueeze(1)
        index = torch.searchsorted(self.pair, wanted).clamp_max(len(self.pair) - 1)
        removed = torch.where(self.pair[index] == wanted, values, 0.0)
        hit = (removed > 0).any(1)
        part = F.embedding_bag(indices[hit], self.sae.W_dec, per_sample_weights=removed[hit], mode="sum")
        changed = x.clone()
        changed[hit] = (x[hit].float() - part).to(x.dtype)
        return changed

    def _encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values, indices = self.sae.encode(pad_rows(x))
        return values[: len(x)], indices[: len(x)]


class Replacement(FeatureAblation):
    """`x + sum_{u in S} (m_u - z_u(x)) W_dec[u]`: at every token, the units have constant activations m_u.

    With m_u the mean over all languages, this is mean ablation; with the mean on another language, swap ablation.
    (Zhang and Nanda 2024, arXiv 2309.16042, compare zero, mean and resampling ablation.)

    Parameters
    ----------
    sae, units: as in `FeatureAblation`.
    values: float32 `[conditions, latents]`, m of every condition.
    """

    def __init__(self, sae: SAE | CachedSAE, units: Units, values: Tensor) -> None:
        super().__init__(sae, units)
        sets = [torch.tensor(list(removed), dtype=torch.int64) for removed in units]
        rows = [row[removed] @ sae.W_dec.detach()[removed].cpu() for row, removed in zip(values, sets, strict=True)]
        self.shift = torch.stack(rows).to(sae.b_dec.device)

    def affected_tokens(self, x: Tensor) -> Tensor:
        """Everywhere, unless all constants are 0; then, where one of the condition's units fires."""
        return super().affected_tokens(x) | (self.shift != 0).any(1, keepdim=True)

    def change(self, x: Tensor, condition: Tensor) -> Tensor:
        """Subtract the units' part of the reconstruction, and add their part at the constants."""
        return (super().change(x, condition).float() + self.shift[condition]).to(x.dtype)


class Directional:
    """`x - Q Q^T x`, Q an orthonormal basis (QR) of the span of the decoder rows: the whole component in it is removed.

    It is not centred: the component of the mean activation is removed, too. Rows that are linearly dependent (to 1e-6
    of the largest singular value) add nothing to the basis.
    """

    def __init__(self, sae: SAE | CachedSAE, units: Units) -> None:
        decoder = sae.W_dec
        self.active = torch.tensor([len(removed) > 0 for removed in units], device=decoder.device)
        self.bases = [basis(decoder[list(removed)]) for removed in units]

    def affected_tokens(self, x: Tensor) -> Tensor:
        """Everywhere."""
        return self.active.unsqueeze(1).expand(-1, len(x))

    def change(self, x: Tensor, condition: Tensor) -> Tensor:
        """Project the span out."""
        changed = x.clone()
        for number in sorted(set(condition.tolist())):
            if self.active[number]:
                rows, q = condition == number, self.bases[number]
                part = x[rows].float()
                changed[rows] = (part - part @ q @ q.T).to(x.dtype)
        return changed


def basis(directions: Tensor) -> Tensor:
    """Orthonormal columns, `[d, rank]`, that span the rows of `directions` `[n, d]`, by QR.

    The rank is that of R: for linearly dependent rows, QR alone would add directions outside their span.
    """
    if not len(directions):
        return directions.new_zeros((directions.shape[1], 0))
    rows = directions.double().T
    q, r = torch.linalg.qr(rows)
    left, size, _ = torch.linalg.svd(r)
    columns: Tensor = (q @ left)[:, size > 1e-6 * size.max()].to(directions.dtype)
    return columns


class Additive:
    """`x + m * sum_{u in S} max_u W_dec[u]` at every token, whether a unit fires or not (Andrylie et al. 2025).

    Parameters
    ----------
    sae: the dictionary.
    units: of every condition.
    largest: float32 `[latents]`, the largest activation of each unit on the training texts (0: never fired).
    m: the factor, -0.2 in the paper.
    """

    def __init__(self, sae: SAE | CachedSAE, units: Units, largest: Tensor, m: float) -> None:
        device = sae.b_dec.device
        # Only the decoder rows that are needed: a dictionary may be as large as the model.
        rows = sorted({unit for removed in units for unit in removed})
        number = {unit: row for row, unit in enumerate(rows)}
        chosen = members([[number[unit] for unit in removed] for removed in units], len(rows), device)
        self.active = chosen.any(1)
        self.shift = m * (chosen * largest[rows].to(device)) @ sae.W_dec.detach()[rows]

    def affected_tokens(self, x: Tensor) -> Tensor:
        """Everywhere."""
        return self.active.unsqueeze(1).expand(-1, len(x))

    def change(self, x: Tensor, condition: Tensor) -> Tensor:
        """Add the condition's vector."""
        return (x.float() + self.shift[condition]).to(x.dtype)


class NeuronAblation:
    """Sets the neurons' activations to 0, at a hookpoint whose dimensions are neurons (`layers.N.mlp.act_fn`)."""

    def __init__(self, width: int, units: Units, device: torch.device | str = "cpu") -> None:
        self.removed = members(units, width, device)
        self.active = self.removed.any(1)

    def affected_tokens(self, x: Tensor) -> Tensor:
        """The tokens on which one of a condition's neurons is not 0 already."""
        return (self.removed.float() @ (x != 0).float().T) > 0

    def change(self, x: Tensor, condition: Tensor) -> Tensor:
        """Set them to 0."""
        return x.masked_fill(self.removed[condition], 0.0)


def interventions(
    method: str,
    units: Mapping[str, Units],
    saes: Mapping[str, SAE] | SAECache,
    largest: Mapping[str, Tensor],
    m: float,
    means: Mapping[str, Tensor],
    ablated: Sequence[int],
) -> dict[str, Intervention]:
    """One intervention on SAE features for every hookpoint; for neurons see `neurons`.

    Parameters
    ----------
    method: "feature", "directional", "additive", "mean" or "swap".
    units: by hookpoint, of every condition.
    saes: by hookpoint.
    largest, m: for "additive", see `Additive`; `largest` by hookpoint.
    means: for "mean" and "swap" the mean activations on every language, `[languages, latents]` by hookpoint: "mean"
        puts their mean over the languages in place of a unit's activation, "swap" the mean on the next language.
    ablated: the language of every condition, as a row of `means`.
    """
    if method in ("mean", "swap"):
        values = {
            name: (table.roll(-1, 0) if method == "swap" else table.mean(0, keepdim=True).expand_as(table))[ablated]
            for name, table in means.items()
        }
        return {name: Replacement(saes[name], removed, values[name]) for name, removed in units.items()}
    if method == "additive":
        return {name: Additive(saes[name], removed, largest[name], m) for name, removed in units.items()}
    if method == "directional":
        return {name: Directional(saes[name], removed) for name, removed in units.items()}
    return {name: FeatureAblation(saes[name], removed) for name, removed in units.items()}


def neurons(
    units: Mapping[str, Units], width: Mapping[str, int], device: torch.device | str
) -> dict[str, Intervention]:
    """One `NeuronAblation` for every hookpoint, of `width` neurons each."""
    return {name: NeuronAblation(width[name], removed, device) for name, removed in units.items()}
