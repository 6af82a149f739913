"""Units of one hookpoint selected on the texts of one domain or of all, and what they score on held-out texts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from babelscope.activations.store import ActivationStore
from babelscope.config import schema
from babelscope.features import lape, sae_lape
from babelscope.features.counter import Counter, whole_texts
from babelscope.identification.classify import identify
from babelscope.identification.unit_totals import UnitTotals, owned
from babelscope.models.names import layer_of
from babelscope.sae.autoencoder import SAE

# The domain of features that are selected on all texts.
ALL = "all"


class Stored(NamedTuple):
    """The stored activations of one hookpoint, text by text.

    Attributes
    ----------
    store: the activations.
    texts: one row per text, in the order of the store: `text_id`, `language`, `split`, `domain`, `tokens`.
    row, text: of each token, its row in the store and the number of its text in `texts`, int64 `[tokens]`.
    """

    store: ActivationStore
    texts: pl.DataFrame
    row: Tensor
    text: Tensor

    def chunks(self, split: str, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The activations `[tokens, d]` of whole texts of a split, and each token's text."""
        kept = (self.texts["split"] == split).to_torch()[self.text]
        row, text = self.row[kept], self.text[kept]
        for start, end in whole_texts(text, size):
            yield self.store.gather(row[start:end]), text[start:end]


@dataclass
class Again:
    """A dictionary from another seed: the SAE, its selected units, and their firings unless stage `stability` knows."""

    sae: SAE
    units: pl.DataFrame
    counted: pl.DataFrame | None = None


@dataclass
class Dictionary:
    """Units that may belong to languages: latents of `sae`, or neurons if it is None.

    Attributes
    ----------
    hookpoint: whose activations the units are computed from, and where they are removed.
    counted: their firings by domain, see `selection.counts`.
    again: by seed, each SAE from another seed.
    units: the selected units by domain ("all": on all texts).
    """

    name: str
    hookpoint: str
    stored: Stored
    sae: SAE | None
    counted: pl.DataFrame
    again: dict[int, Again] = field(default_factory=dict)
    units: dict[str, pl.DataFrame] = field(default_factory=dict)


def text_means(stored: Stored, split: str, size: int) -> NDArray[np.float64]:
    """The mean activation of each text of a split, float64 `[texts, d]`, in the order of `stored.texts`."""
    total = torch.zeros(len(stored.texts), stored.store.d, dtype=torch.float64)
    for x, text in stored.chunks(split, size):
        total.index_add_(0, text, x.double())
    mask = (stored.texts["split"] == split).to_torch()
    means: NDArray[np.float64] = (total / stored.texts["tokens"].to_torch().clamp_min(1).unsqueeze(1))[mask].numpy()
    return means


def counts(stored: Stored, dictionary: SAE | None, hookpoint: str, size: int, device: torch.device) -> pl.DataFrame:
    """On the train split, by domain: `Counter.frame` with `domain`.

    `dictionary`: whose latents are counted; None: the dimensions of the activations (neurons).
    """
    pairs = stored.texts.select("language", "domain").unique().sort("language", "domain")
    names = [str(number) for number in range(len(pairs))]
    numbered = stored.texts.join(pairs.with_columns(pair=pl.Series(range(len(pairs)), dtype=pl.Int64)),
                                 on=["language", "domain"], how="left", maintain_order="left")  # fmt: skip
    code = numbered["pair"].to_torch()
    counter = Counter(names, stored.store.d if dictionary is None else dictionary.latents)
    for x, text in stored.chunks("train", size):
        if dictionary is None:
            counter.add_dense(x, code[text], text)
        else:
            values, indices = dictionary.encode(x.to(device))
            counter.add(values.cpu(), indices.cpu(), code[text], text)
    frame = counter.frame(layer_of(hookpoint)).rename({"language": "pair"})
    return frame.join(pairs.with_columns(pair=pl.Series(names)), on="pair", how="left", maintain_order="left").drop(
        "pair"
    )


def totals(stored: Stored, domain: str | None, languages: Sequence[str]) -> pl.DataFrame:
    """`language`, `tokens`, `texts` of the train split of a domain (None: all), in the order of `languages`."""
    rows = in_domain(stored.texts.filter(split="train"), domain)
    return (
        rows.group_by("language")
        .agg(pl.col("tokens").sum(), texts=pl.len().cast(pl.Int64))
        .sort(pl.col("language").cast(pl.Enum(languages)))
    )


def in_domain(frame: pl.DataFrame, domain: str | None) -> pl.DataFrame:
    """The rows of a domain; None: all."""
    return frame if domain is None else frame.filter(pl.col("domain") == domain)


def select(
    counted: pl.DataFrame,
    totals: pl.DataFrame,
    domain: str | None,
    score: schema.Score,
    neurons: tuple[int, int] | None,
) -> pl.DataFrame:
    """The units of each language, by SAE-LAPE, or by LAPE for neurons: `language`, `unit`, `probability`, `rank`.

    `counted`: see `counts`. `domain`: the texts on which they are selected; None: all. `neurons`: the number of all
    neurons and of those wanted; None: latents.
    """
    sums = in_domain(counted, domain).group_by("layer", "unit", "language").agg(pl.col("tokens", "texts").sum())
    if neurons is None:
        found = sae_lape(sums, totals, **score.selection)
    else:
        width, wanted = neurons
        found = lape(sums, totals, units=width, top_rate=min(1.0, wanted / width))
    return found.select("language", "unit", "probability", "rank")


def unit_totals(
    stored: Stored, dictionary: SAE | None, hookpoint: str, units: pl.DataFrame, languages: Sequence[str], size: int,
    device: torch.device,
) -> pl.DataFrame:  # fmt: skip
    """How often the units of each language fire on each text of the split eval: one column per language."""
    saes = {} if dictionary is None else {hookpoint: dictionary}
    found = UnitTotals(len(stored.texts), {hookpoint: owned(units, None, languages)}, saes, device)
    for x, text in stored.chunks("eval", size):
        found.add(hookpoint, x, text)
    method = "neuron-count" if dictionary is None else "sae-count"
    return pl.DataFrame(found.totals[method].numpy(), schema=list(languages)).filter(stored.texts["split"] == "eval")


def predicted(totals: pl.DataFrame, units: pl.DataFrame, among: Sequence[str]) -> pl.Series:
    """The language in `among` whose units fire most on each text, relative to their number; null if none has units."""
    number = {name: units.filter(language=name).height for name in among}
    if not any(number.values()):
        return pl.Series([None] * len(totals), dtype=pl.String)
    return identify(totals.select(among).with_row_index("text"), number)["predicted"]
