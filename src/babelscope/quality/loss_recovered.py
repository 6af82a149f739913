"""Loss recovered: how much of what a hookpoint does for the model's predictions its SAE's reconstruction still does.

    loss recovered = (CE_zero - CE_sae) / (CE_zero - CE_clean)

CE is the NLL per token: of the pass left alone (clean), with the SAE's reconstruction in the place of the activations
at one hookpoint (sae), and with 0 in their place (zero). 1: nothing is lost; 0: no better than no activations at all;
below 0: worse than that. (Rajamanoharan et al. 2024, arXiv 2404.16014, section on evaluation, where it reads
1 - (CE_sae - CE_clean) / (CE_zero - CE_clean), which is the same.)

Only the positions of the text's own tokens are changed, as in ablation: special tokens (BOS) stay as they are in both
passes, for the SAE has seen none. The clean pass is computed once; the two passes of a hookpoint start at its block if
the model allows for it (`probing.can_restart`).
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import torch
from safetensors.torch import save_file
from torch import Tensor

from babelscope.core.files import write_atomically
from babelscope.core.resume import read_part
from babelscope.models import hookpoints as hooks
from babelscope.models import probing
from babelscope.models.head import head_of
from babelscope.models.nll import targets, text_nll
from babelscope.models.tokens import TokenizedText, batches, pad
from babelscope.sae.autoencoder import SAE
from babelscope.sae.cache import CachedSAE, SAECache

# Few texts have few of like length. Padding costs their blocks alone, since an NLL is of real tokens only; a pass over
# few tokens costs more: it reads all weights.
_MOST_PADDING = 1.0

SCHEMA = {
    "hookpoint": pl.String, "layer": pl.Int32, "language": pl.String, "tokens": pl.Int64, "nll_clean": pl.Float64,
    "nll_sae": pl.Float64, "nll_zero": pl.Float64, "loss_recovered": pl.Float64,
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
    advance: Callable[[int], None] = lambda _: None,
) -> pl.DataFrame:
    """Measure every SAE, on all texts and on those of each language.

    Parameters
    ----------
    model: a causal language model.
    saes: by hookpoint, on the model's device; a transcoder (`b_in` given) encodes what enters the hookpoint's module.
    texts: in `by_length` order, so that padding costs little.
    language: of each text.
    languages: which of them get rows, in this order; those without a target token get none.
    batch_tokens: tokens in one forward pass, padding included.
    keep: folder for the result of every batch, from which an interrupted run goes on; the caller deletes it.
    advance: told the number of target tokens done after every batch.

    Returns
    -------
    `SCHEMA`, for every hookpoint a row of all texts (`language` null), then one per language. `tokens` are target
    tokens, the NLLs nats per token; `loss_recovered` is null where zeros cost nothing: there is nothing to recover.

    Raises
    ------
    UserError: the model has no such hookpoint.
    """
    hooks.resolve(model, list(saes))
    head_of(model)  # tried now, when no hook is open
    layers = sorted({hooks.layer_of(name) for name in saes})
    # Where no pass can start in the middle, all of them run from the embeddings.
    kept = layers if probing.can_restart(model, layers) else []
    parts: list[dict[str, Tensor]] = []
    first = 0
    for batch in batches(texts, batch_tokens, _MOST_PADDING):
        file = None if keep is None else keep / f"from-{first:06d}.safetensors"
        part = None if file is None else read_part(file)
        if part is None:
            with torch.inference_mode():
                part = _batch(model, saes, batch, kept)
            if file is not None:
                write_atomically(file, functools.partial(save_file, part))
        parts.append(part)
        first += len(batch)
        advance(int(part["tokens"].sum()))
    sums = {key: torch.cat([part[key] for part in parts], -1) for key in ("clean", "sae", "zero", "tokens")}
    return _frame(sums, list(saes), language, languages)


def splice(sae: SAE | CachedSAE, own: Tensor, entering: Mapping[str, Tensor], name: str) -> hooks.Edit:
    """The edit that puts the SAE's reconstruction in the place of the activations.

    Parameters
    ----------
    sae: the dictionary of the hookpoint `name`.
    own: bool `[texts, longest]`, the positions to change.
    entering: what a transcoder encodes, see `hookpoints.inputs_of`.
    """

    def edit(x: Tensor) -> Tensor:
        changed = x.clone()
        changed[own] = sae(entering[name][own] if sae.is_transcoder else x[own]).to(x.dtype)
        return changed

    return edit


def zero(own: Tensor) -> hooks.Edit:
    """The edit that sets the activations at `own` (bool `[texts, longest]`) to 0."""
    return lambda x: x.masked_fill(own.unsqueeze(-1), 0.0)


def _batch(
    model: Any, saes: Mapping[str, SAE] | SAECache, batch: Sequence[TokenizedText], kept: Sequence[int]
) -> dict[str, Tensor]:
    """NLL sums of a batch, on the CPU: `clean`, `tokens` `[texts]`; `sae`, `zero` `[hookpoints, texts]`.

    `kept`: the blocks before which passes can start.
    """
    device = hooks.device_of(model)
    ids, mask = (t.to(device) for t in pad(batch))
    special = torch.tensor([text.special for text in batch], device=device)
    own = mask.bool() & (torch.arange(ids.shape[1], device=device) >= special.unsqueeze(1))
    with hooks.block_inputs(model, kept) as before:
        clean = text_nll(model, ids, mask, special)
    hidden = dict(before)

    def nll(name: str, edit: hooks.Edit) -> Tensor:
        layer = hooks.layer_of(name)
        with hooks.starting_at(model, layer, hidden.get(layer)), hooks.editing(model, {name: edit}):
            return text_nll(model, ids, mask, special)

    with hooks.inputs_of(model, [name for name, sae in saes.items() if sae.is_transcoder]) as entering:
        spliced = torch.stack([nll(name, splice(sae, own, entering, name)) for name, sae in saes.items()])
    zeroed = torch.stack([nll(name, zero(own)) for name in saes])
    sums = {"clean": clean, "sae": spliced, "zero": zeroed, "tokens": targets(mask, special).sum(1)}
    return {key: value.cpu().contiguous() for key, value in sums.items()}


def _frame(
    sums: Mapping[str, Tensor], names: Sequence[str], language: Sequence[str], languages: Sequence[str]
) -> pl.DataFrame:
    rows = []
    for at, name in enumerate(names):
        for group in (None, *languages):
            chosen = torch.tensor([group is None or of == group for of in language])
            tokens = int(sums["tokens"][chosen].sum())
            if tokens:
                clean, spliced, zeroed = (
                    float(nll[chosen].sum()) / tokens for nll in (sums["clean"], sums["sae"][at], sums["zero"][at])
                )
                share = (zeroed - spliced) / (zeroed - clean) if zeroed > clean else None
                rows.append((name, hooks.layer_of(name), group, tokens, clean, spliced, zeroed, share))
    return pl.DataFrame(rows, schema=SCHEMA, orient="row")
