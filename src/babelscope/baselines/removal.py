"""The NLL without what marks a language at one hookpoint: a direction's component, latents, or neurons."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from babelscope.ablation.ablate import TextNLL, ablate
from babelscope.ablation.conditions import Conditions
from babelscope.ablation.interventions import FeatureAblation, Intervention, NeuronAblation
from babelscope.baselines.directions import Classifier
from babelscope.core.progress import Progress
from babelscope.models.nll import target_count
from babelscope.models.tokens import TokenizedText
from babelscope.sae.autoencoder import SAE

# Held-out tokens of every other language, as a share of those of the language itself.
OTHERS = 0.2


class DirectionAblation:
    """`x - ((x - m) w) w`: along the language's direction w, every token becomes like the others' mean m."""

    def __init__(self, classifier: Classifier, device: torch.device) -> None:
        self.w, self.m = (
            torch.from_numpy(table).float().to(device) for table in (classifier.directions, classifier.others)
        )
        self.active = torch.ones(len(self.w), dtype=torch.bool, device=device)

    def affected_tokens(self, x: Tensor) -> Tensor:
        """Everywhere."""
        return self.active.unsqueeze(1).expand(-1, len(x))

    def change(self, x: Tensor, condition: Tensor) -> Tensor:
        """Replace the component."""
        w = self.w[condition]
        part = ((x.float() - self.m[condition]) * w).sum(1, keepdim=True) * w
        return (x.float() - part).to(x.dtype)


def of_units(
    units: pl.DataFrame, dictionary: SAE | None, width: int, languages: Sequence[str], device: torch.device
) -> Intervention:
    """Removes the units of each language: latents, or if there is no dictionary, of `width` neurons."""
    sets = [units.filter(language=name)["unit"].to_list() for name in languages]
    return NeuronAblation(width, sets, device) if dictionary is None else FeatureAblation(dictionary, sets)


def measure(
    model: Any, hookpoint: str, intervention: Intervention, texts: Sequence[TokenizedText], language: Sequence[str],
    languages: Sequence[str], batch_tokens: int, limit: int, keep: Path,
) -> TextNLL:  # fmt: skip
    """The NLL of `texts` (in `by_length` order) without what marks each language.

    Each language's own texts are all measured, and of the others a sample of about `OTHERS * limit` tokens. `keep`: a
    folder for finished batches (see `ablate`).
    """
    schema = {"ablated": pl.String, "hookpoint": pl.String, "control": pl.Int32, "top": pl.Int32}
    keys = pl.DataFrame([(name, None, None, None) for name in languages], schema=schema, orient="row")
    asked = Conditions(keys.with_row_index("condition"), {}).asked(
        language, np.array([*map(target_count, texts)]), max(1, int(OTHERS * limit))
    )
    with Progress(f"baselines {hookpoint}", sum(map(target_count, texts)), "tokens") as progress:
        return ablate(
            model, {hookpoint: intervention}, texts, batch_tokens,
            asked=torch.from_numpy(asked), keep=keep, advance=progress.update,
        )  # fmt: skip
