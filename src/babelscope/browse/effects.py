"""The change of the NLL of texts of a feature's own languages when the feature alone is removed."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from babelscope.ablation.ablate import ablate
from babelscope.ablation.interventions import FeatureAblation
from babelscope.models.tokens import TokenizedText
from babelscope.sae.autoencoder import SAE
from babelscope.sae.cache import SAECache

SCHEMA = {
    "delta": pl.Float64, "delta_low": pl.Float64, "delta_high": pl.Float64, "delta_tokens": pl.Int64,
    "delta_texts": pl.Int64,
}  # fmt: skip
# A bootstrap of fewer texts says too little about their spread; it draws this often.
ENOUGH, RESAMPLES = 5, 1000


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
    """Change of the NLL with one feature at a time removed (`FeatureAblation`).

    Parameters
    ----------
    features: hookpoint and unit of each.
    texts: in `by_length` order, at least those of `wanted`.
    wanted: the text ids on which each feature is measured.
    batch_tokens, keep, advance: as in `ablate`.

    Returns
    -------
    `SCHEMA`, a row per feature: `delta` (nats/token, over the target tokens of its texts together), `delta_low`,
    `delta_high` (95 %, see `interval`; null with fewer than `ENOUGH` texts), `delta_tokens`, `delta_texts`; `delta` is
    null if there is no target token.
    """
    used = {text_id for ids in wanted for text_id in ids}
    chosen = [text for text in texts if text.text_id in used]
    index = {text.text_id: number for number, text in enumerate(chosen)}
    measured = [number for number, ids in enumerate(wanted) if ids]
    asked = torch.zeros((len(measured), len(chosen)), dtype=torch.bool)
    for row, number in enumerate(measured):
        asked[row, [index[text_id] for text_id in wanted[number]]] = True
    rows: list[tuple[float | None, float | None, float | None, int, int]] = [(None, None, None, 0, 0)] * len(features)
    if measured:
        conditions = [features[number] for number in measured]
        interventions = {
            name: FeatureAblation(saes[name], [[unit] if hookpoint == name else [] for hookpoint, unit in conditions])
            for name in saes if name in dict(conditions)
        }  # fmt: skip
        nll = ablate(model, interventions, chosen, batch_tokens, asked=asked, keep=keep, advance=advance)
        change, tokens = (nll.ablated - nll.clean).numpy(), nll.tokens.numpy()
        for row, number in enumerate(measured):
            on = asked[row].numpy()
            nats, size = change[row, on], tokens[on]
            count = int(size.sum())
            low, high = interval(nats, size) if count and len(size) >= ENOUGH else (None, None)
            rows[number] = (float(nats.sum()) / count if count else None, low, high, count, len(size))
    return pl.DataFrame(rows, schema=SCHEMA, orient="row")


def interval(nats: NDArray[np.float64], tokens: NDArray[np.int64]) -> tuple[float, float]:
    """The 95 % interval of `sum(nats) / sum(tokens)` over texts: percentile bootstrap (Efron 1979), always the same.

    `nats`, `tokens`: of each text, `[texts]`.
    """
    drawn = np.random.default_rng(0).integers(len(nats), size=(RESAMPLES, len(nats)))
    low, high = np.quantile(nats[drawn].sum(1) / np.maximum(1, tokens[drawn].sum(1)), (0.025, 0.975))
    return float(low), float(high)
