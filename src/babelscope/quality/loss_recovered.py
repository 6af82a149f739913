"""Loss recovered: the share of a hookpoint's effect on the model's loss that its SAE's reconstruction keeps.

    loss recovered = (CE_zero - CE_sae) / (CE_zero - CE_clean)

CE is the NLL per token: of the unchanged model (clean), with the SAE's reconstruction in place of the activations at
one hookpoint (sae), and with 0 in their place (zero). 1: nothing is lost; 0: the reconstruction is as bad as zeros;
below 0: it is worse. (Rajamanoharan et al. 2024, arXiv 2404.16014, write the same as
1 - (CE_sae - CE_clean) / (CE_zero - CE_clean).)

Only content tokens are changed, as in ablation: the SAE was not trained on special tokens (BOS). The clean pass is
computed once; the two passes of a hookpoint start at its block if the model allows it (`probing.can_restart`).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch import Tensor
from torch.nn import functional

from babelscope.core import resume
from babelscope.models import hookpoints as hooks
from babelscope.models import probing
from babelscope.models.nll import head_of, target_count, targets, text_nll
from babelscope.models.tokens import TokenizedText, batches, pad
from babelscope.sae.autoencoder import SAE
from babelscope.sae.cache import CachedSAE, SAECache

# Bootstrap resamples of the texts for the 95 % intervals.
RESAMPLES = 1000

# With few texts, few have similar lengths. Padding costs less than more passes: it takes time in the blocks only, since
# the NLL is computed for real tokens only, but every pass reads all weights.
_MOST_PADDING = 0.6

SCHEMA = {
    "hookpoint": pl.String, "layer": pl.Int32, "language": pl.String, "tokens": pl.Int64, "nll_clean": pl.Float64,
    "nll_sae": pl.Float64, "nll_zero": pl.Float64, "loss_recovered": pl.Float64, "low": pl.Float64, "high": pl.Float64,
}  # fmt: skip


def loss_recovered(
    model: Any,
    saes: Mapping[str, SAE] | SAECache,
    texts: Sequence[TokenizedText],
    language: Sequence[str],
    languages: Sequence[str],
    batch_tokens: int,
    *,
    keep: Path | None = None,
) -> pl.DataFrame:
    """Measure every SAE, on all texts and on those of each language.

    Parameters
    ----------
    saes: by hookpoint, on the model's device; a transcoder (`b_in` given) encodes what enters the hookpoint's module.
    texts: in `by_length` order, so that padding costs little.
    language: of each text.
    languages: those that get rows, in this order, if they have target tokens.
    batch_tokens: tokens in one forward pass, including padding.
    keep: folder for the result of every batch, see `resume.parts`.

    Returns
    -------
    `SCHEMA`, for every hookpoint a row of all texts (`language` null), then one per language. `tokens` are target
    tokens, NLLs are in nats per token; `loss_recovered` is null if zeros do not raise the NLL. `low`, `high`: its 95 %
    interval over resamples of each language's texts (Efron 1979, percentile method), null if zeros do not raise the NLL
    in one of them.

    Raises
    ------
    UserError: the model has no such hookpoint.
    """
    hooks.resolve(model, list(saes))
    head_of(model)  # probed now, without hooks, and cached
    layers = sorted({hooks.layer_of(name) for name in saes})
    restarts = layers if probing.can_restart(model, layers) else []

    parts = list(
        resume.parts(
            "quality", batches(texts, batch_tokens, _MOST_PADDING), lambda batch: _sums(model, saes, batch, restarts),
            keep, size=lambda batch: sum(map(target_count, batch)), unit="tokens",
        )
    )  # fmt: skip
    sums = {key: torch.cat([part[key] for part in parts], -1) for key in ("clean", "sae", "zero", "tokens")}
    return _frame(sums, list(saes), language, languages)


def splice(sae: SAE | CachedSAE, content: Tensor, inputs: Mapping[str, Tensor], name: str) -> hooks.Edit:
    """The edit that replaces the activations by the SAE's reconstruction.

    Parameters
    ----------
    sae: the dictionary of the hookpoint `name`.
    content: bool `[texts, longest]`, the positions to change.
    inputs: what a transcoder encodes, see `hookpoints.inputs_of`.
    """

    def edit(x: Tensor) -> Tensor:
        changed = x.clone()
        changed[content] = sae((inputs[name] if sae.is_transcoder else x)[content]).to(x.dtype)
        return changed

    return edit


def zero(content: Tensor) -> hooks.Edit:
    """The edit that sets the activations at `content` (bool `[texts, longest]`) to 0."""
    return lambda x: x.masked_fill(content.unsqueeze(-1), 0.0)


@torch.inference_mode()
def _sums(
    model: Any, saes: Mapping[str, SAE] | SAECache, batch: Sequence[TokenizedText], restarts: Sequence[int]
) -> dict[str, Tensor]:
    """NLL sums of a batch, on the CPU: `clean`, `tokens` `[texts]`; `sae`, `zero` `[hookpoints, texts]`.

    `restarts`: the blocks before which passes can start; passes at other blocks start at the embeddings.
    """
    device = hooks.device_of(model)
    ids, mask = (t.to(device) for t in pad(batch))
    special = torch.tensor([text.special for text in batch], device=device)
    content = mask.bool() & (torch.arange(ids.shape[1], device=device) >= special.unsqueeze(1))
    with hooks.block_inputs(model, restarts) as inputs:
        clean = text_nll(model, ids, mask, special)
    hidden = dict(inputs)

    def nll(name: str, edit: hooks.Edit) -> Tensor:
        layer = hooks.layer_of(name)
        with hooks.starting_at(model, layer, hidden.get(layer)), hooks.editing(model, {name: edit}):
            return text_nll(model, ids, mask, special)

    with hooks.inputs_of(model, [name for name, sae in saes.items() if sae.is_transcoder]) as entering:
        spliced = torch.stack([nll(name, splice(sae, content, entering, name)) for name, sae in saes.items()])
    zeroed = torch.stack([nll(name, zero(content)) for name in saes])
    sums = {"clean": clean, "sae": spliced, "zero": zeroed, "tokens": targets(mask, special).sum(1)}
    return {key: value.cpu().contiguous() for key, value in sums.items()}


def _frame(
    sums: Mapping[str, Tensor], names: Sequence[str], language: Sequence[str], languages: Sequence[str]
) -> pl.DataFrame:
    weights = _weights(language)
    rows = []
    for number, name in enumerate(names):
        nlls = torch.stack([sums["clean"], sums["sae"][number], sums["zero"][number]])
        for group in (None, *languages):
            chosen = torch.tensor([group in (None, code) for code in language])
            tokens = int(sums["tokens"][chosen].sum())
            if tokens:
                weight = weights[:, chosen]
                # The denominator is 0 only in resamples of texts without any target.
                count = (weight @ sums["tokens"][chosen].double()).clamp(min=1.0)
                clean, spliced, zeroed = nlls[:, chosen] @ weight.T / count
                share = torch.where(zeroed > clean, (zeroed - spliced) / (zeroed - clean), torch.nan)
                low, high = share[1:].quantile(torch.tensor([0.025, 0.975], dtype=share.dtype)).tolist()
                figures = (float(clean[0]), float(spliced[0]), float(zeroed[0]), float(share[0]), low, high)
                rows.append((name, hooks.layer_of(name), group, tokens, *figures))
    return pl.DataFrame(rows, schema=SCHEMA, orient="row").fill_nan(None)


def _weights(language: Sequence[str]) -> Tensor:
    """How often each text counts, float64 `[1 + RESAMPLES, texts]`: once, then as often as a resample has it.

    A resample draws as many texts of each language as there are.
    """
    weights = torch.ones((1 + RESAMPLES, len(language)), dtype=torch.float64)
    random = torch.Generator().manual_seed(0)
    for code in sorted(set(language)):
        columns = torch.tensor([i for i, other in enumerate(language) if other == code])
        drawn = torch.randint(len(columns), (RESAMPLES, len(columns)), generator=random)
        weights[1:, columns] = functional.one_hot(drawn, len(columns)).sum(1).double()
    return weights
