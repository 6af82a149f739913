"""Totals of every language's units in every text, from which `identify` predicts the language."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import polars as pl
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from babelscope.core.errors import UserError
from babelscope.models.tokens import codes
from babelscope.sae.autoencoder import SAE
from babelscope.sae.cache import SAECache

# The methods of the paper, by kind of unit.
METHODS = {"sae": ("sae-count", "sae-min-max"), "neuron": ("neuron-count",)}


class Owned(NamedTuple):
    """The m units of one hookpoint that belong to languages.

    `activation * scale - shift` is the activation scaled by the range that it has on the language; both are 0 if the
    language does not own the unit, or no ranges are known.
    """

    units: Tensor  # their numbers, int64 [m], ascending
    owns: Tensor  # 1 if the language owns the unit, float32 [m, languages]
    scale: Tensor  # float32 [m, languages]
    shift: Tensor  # float32 [m, languages]


def owned(features: pl.DataFrame, counts: pl.DataFrame | None, languages: Sequence[str]) -> Owned:
    """The units that `features` give to each language.

    Min-max: (a - min) / (max - min + 1e-6), with the smallest and largest positive activation that the unit has on the
    language that owns it (Andrylie et al. 2025, arXiv 2507.11230).

    `features`: `unit`, `language`, the selection at one hookpoint. `counts`: `unit`, `language`, `min_positive`, `max`
    of the same hookpoint, or None if no range is wanted. `languages`: order of the columns.

    Raises
    ------
    UserError: `counts` lack a pair of unit and language that `features` hold.
    """
    pairs = features.select(pl.col("unit").cast(pl.Int64), "language").sort("unit", "language")
    units = pairs["unit"].unique().sort()
    row = units.search_sorted(pairs["unit"]).cast(pl.Int64).to_torch()
    column = codes(pairs["language"], languages)
    owns, scale, shift = (torch.zeros(len(units), len(languages)) for _ in range(3))
    owns[row, column] = 1.0
    if counts is not None:
        ranges = pairs.join(
            counts.select(pl.col("unit").cast(pl.Int64), "language", "min_positive", "max"),
            on=["unit", "language"], how="left", maintain_order="left",
        )  # fmt: skip
        if ranges["max"].null_count():
            raise UserError(
                "counts: some selected units never fire: they come from other counts; run `dvc repro score`"
            )
        low, high = (ranges[name].cast(pl.Float64).to_torch() for name in ("min_positive", "max"))
        scale[row, column] = (1 / (high - low + 1e-6)).float()
        shift[row, column] = (low / (high - low + 1e-6)).float()
    return Owned(units.to_torch(), owns, scale, shift)


class UnitTotals:
    """Adds up, text by text, the firings and activations of every language's units.

    `texts`: number of texts. `owners`: by hookpoint. `saes`: the dictionary of every hookpoint whose units are latents;
    at other hookpoints the units are neurons.

    Attributes
    ----------
    totals: by method, float64 `[texts, languages]`: firings (count), or the sum of scaled activations (min-max).
    """

    def __init__(
        self, texts: int, owners: Mapping[str, Owned], saes: Mapping[str, SAE] | SAECache,
        device: torch.device = torch.device("cpu"),  # noqa: B008
    ) -> None:  # fmt: skip
        self.device, self.owners, self.saes = device, dict(owners), saes
        kinds = {"sae" if name in saes else "neuron" for name in owners}
        width = next((part.owns.shape[1] for part in owners.values()), 0)
        names = [method for kind, methods in METHODS.items() if kind in kinds for method in methods]
        self.totals = {method: torch.zeros(texts, width, dtype=torch.float64) for method in names}
        self._tables = {name: self._table(name) for name in owners}

    def _table(self, name: str) -> tuple[Tensor, ...]:
        """For latents: each latent's row in the three tables, whose last row is 0 and for latents that nobody owns."""
        owned = self.owners[name]
        if name not in self.saes:
            return owned.units.to(self.device), owned.owns.to(self.device)
        index = torch.full((self.saes[name].latents,), len(owned.units), dtype=torch.int64)
        index[owned.units] = torch.arange(len(owned.units))
        tables = (F.pad(table, (0, 0, 0, 1)) for table in (owned.owns, owned.scale, owned.shift))
        return tuple(table.to(self.device) for table in (index, *tables))

    def reads(self, hookpoint: str) -> str:
        """The hookpoint whose activations `add` takes: a transcoder reads the input of its hookpoint's module."""
        dictionary = self.saes.get(hookpoint)
        return hookpoint if dictionary is None else dictionary.input_name(hookpoint)

    @torch.no_grad()
    def add(self, hookpoint: str, activations: Tensor, text: Tensor) -> None:
        """Add tokens of any texts: the activations `[tokens, d]` at `reads(hookpoint)`.

        `text`: number of the text of each token, int64 `[tokens]`.
        """
        x = activations.to(self.device)
        if hookpoint not in self.saes:
            units, owns = self._tables[hookpoint]
            self.totals["neuron-count"].index_add_(0, text, ((x[:, units] > 0).float() @ owns).double().cpu())
            return
        index, owns, scale, shift = self._tables[hookpoint]
        values, indices = self.saes[hookpoint].encode(x)
        values, rows = values.float(), index[indices]
        fires = (values > 0).float()

        def total(table: Tensor, weights: Tensor) -> Tensor:
            return F.embedding_bag(rows, table, per_sample_weights=weights, mode="sum")

        count, scaled = total(owns, fires), total(scale, values * fires) - total(shift, fires)
        self.totals["sae-count"].index_add_(0, text, count.double().cpu())
        self.totals["sae-min-max"].index_add_(0, text, scaled.double().cpu())
