"""What taking out one feature alone does to its own languages' text."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import torch

from babelscope.ablation.ablate import ablate
from babelscope.ablation.interventions import FeatureAblation
from babelscope.models.tokens import TokenizedText
from babelscope.sae.autoencoder import SAE
from babelscope.sae.cache import SAECache

SCHEMA = {"delta": pl.Float64, "delta_tokens": pl.Int64, "delta_texts": pl.Int64}


def effects(
    model: Any,
    saes: Mapping[str, SAE] | SAECache,
    features: Sequence[tuple[str, int]],
    texts: Sequence[TokenizedText],
    wanted: Sequence[Sequence[str]],
    batch_tokens: int,
    *,
    keep: Path | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> pl.DataFrame:
    """Change of the NLL with one feature at a time taken out (`FeatureAblation`).

    Parameters
    ----------
    model: a causal language model.
    saes: by hookpoint.
    features: hookpoint and unit of each.
    texts: in `by_length` order.
    wanted: the text ids on which each feature is measured.
    batch_tokens: tokens in one forward pass.
    keep, advance: as in `ablate`.

    Returns
    -------
    `SCHEMA`, a row per feature: `delta` (nats/token, over the target tokens of its texts together), `delta_tokens`,
    `delta_texts`; `delta` is null where there is no target token.
    """
    asking = [number for number, some in enumerate(wanted) if some]
    used = {text_id for some in wanted for text_id in some}
    chosen = [text for text in texts if text.text_id in used]
    place = {text.text_id: number for number, text in enumerate(chosen)}
    asked = torch.zeros((len(asking), len(chosen)), dtype=torch.bool)
    for row, number in enumerate(asking):
        asked[row, [place[text_id] for text_id in wanted[number]]] = True
    rows: list[tuple[float | None, int, int]] = [(None, 0, 0)] * len(features)
    if asking:
        names = [name for name in saes if any(features[number][0] == name for number in asking)]
        interventions = {
            name: FeatureAblation(
                saes[name], [[features[number][1]] if features[number][0] == name else [] for number in asking]
            )
            for name in names
        }
        nll = ablate(model, interventions, chosen, batch_tokens, asked=asked, keep=keep, advance=advance)
        change = (nll.ablated - nll.clean).where(asked, 0.0).sum(1).tolist()
        tokens = (asked * nll.tokens).sum(1).tolist()
        for row, number in enumerate(asking):
            delta = change[row] / tokens[row] if tokens[row] else None
            rows[number] = (delta, tokens[row], len(wanted[number]))
    return pl.DataFrame(rows, schema=SCHEMA, orient="row")
