"""Feature ablation: remove a language's features from the forward pass and measure the NLL of every language.

`x <- x - sum_{u in S} z_u(x) W_dec[u]` at every position of the text, `z_u` being the SAE's own activation: the SAE's
reconstruction error stays in place, so ablating nothing changes nothing, bit for bit. (Andrylie et al. 2025, section on
interventions; the form with the SAE's own activations is ours, their additive form differs.)

Only what can change is computed. The clean pass shows which features fire on which text; a condition none of whose
features fires on a text leaves its logits as they are, and any other pass starts at the block of the first hookpoint
at which one fires, from the residual stream that the clean pass left there.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from babelscope.evaluation.nll import targets, text_nll
from babelscope.files import write_atomically
from babelscope.models import hookpoints as hooks
from babelscope.models.tokens import TokenizedText, batches, pad
from babelscope.sae.autoencoder import SAE


@dataclass(frozen=True)
class Condition:
    """A set of features to remove: unit numbers by hookpoint."""

    name: str
    units: Mapping[str, Sequence[int]]


@dataclass
class TextNLL:
    """NLL of every text in the clean run and under every condition.

    Attributes
    ----------
    clean: nats, float64 `[texts]`.
    ablated: nats, float64 `[conditions, texts]`; equal to `clean` where nothing that is removed fires, NaN where the
        condition was not asked for.
    tokens: target tokens, int64 `[texts]`.
    passes: how many (condition, text) pairs had to be computed.
    """

    clean: Tensor
    ablated: Tensor
    tokens: Tensor
    passes: int


def removed_units(conditions: Sequence[Condition], hookpoint: str, latents: int) -> Tensor:
    """Bool `[conditions, latents]`: which units of `hookpoint` each condition removes."""
    removed = torch.zeros((len(conditions), latents), dtype=torch.bool)
    for row, condition in enumerate(conditions):
        removed[row, torch.tensor(list(condition.units.get(hookpoint, ())), dtype=torch.int64)] = True
    return removed


def remove(sae: SAE, removed: Tensor, own: Tensor) -> hooks.Edit:
    """The edit that subtracts from `x[row]` the part of its reconstruction that the units in `removed[row]` make.

    Parameters
    ----------
    sae: the dictionary of the hookpoint.
    removed: bool `[rows, latents]`.
    own: bool `[rows, tokens]`, the positions of the text's own tokens: the SAE has seen no others, and what it makes of
        a BOS token, whose norm is far from any other's, says nothing about a language.
    """
    return lambda x: _without(sae, removed, own, x)


def _without(sae: SAE, removed: Tensor, own: Tensor, x: Tensor) -> Tensor:
    position = (own & removed.any(1, keepdim=True)).flatten().nonzero().squeeze(1)
    if not len(position):
        return x
    values, indices = sae.encode(x.flatten(0, 1)[position].float())
    row = position.div(x.shape[1], rounding_mode="floor").unsqueeze(1)
    kept = torch.where(removed[row, indices], values, 0.0)
    touched = (kept > 0).any(1)
    part = F.embedding_bag(indices[touched], sae.W_dec, per_sample_weights=kept[touched], mode="sum")
    flat = x.flatten(0, 1).clone()
    changed = position[touched]
    flat[changed] = (flat[changed].float() - part).to(x.dtype)
    return flat.view_as(x)


def ablate(
    model: Any,
    saes: Mapping[str, SAE],
    texts: Sequence[TokenizedText],
    conditions: Sequence[Condition],
    batch_tokens: int,
    *,
    asked: Tensor | None = None,
    keep: Path | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> TextNLL:
    """NLL of every text, clean and under every condition.

    Parameters
    ----------
    model: a causal language model.
    saes: by hookpoint.
    texts: in `by_length` order, so that padding costs little.
    conditions: what to remove.
    batch_tokens: tokens in one forward pass, padding included.
    asked: bool `[conditions, texts]`, the pairs that are wanted; null: all.
    keep: folder for the result of every batch, from which an interrupted run goes on; the caller deletes it.
    advance: told the number of target tokens done after every batch.
    """
    device = hooks.device_of(model)
    order = sorted(saes, key=hooks.layer_of)
    removed = {name: removed_units(conditions, name, sae.W_dec.shape[0]).to(device) for name, sae in saes.items()}
    wanted = torch.ones((len(conditions), len(texts)), dtype=torch.bool) if asked is None else asked
    parts: list[dict[str, Tensor]] = []
    first = 0
    for batch in batches(texts, batch_tokens):
        file = None if keep is None else keep / f"from-{first:06d}.safetensors"
        if file is not None and file.is_file():
            part = load_file(file)
        else:
            here = wanted[:, first : first + len(batch)].to(device)
            with torch.inference_mode():
                part = _batch(model, saes, order, removed, batch, here, batch_tokens, device)
            if file is not None:
                write_atomically(file, functools.partial(save_file, part))
        parts.append(part)
        first += len(batch)
        advance(int(part["tokens"].sum()))
    clean, ablated, tokens = (torch.cat([part[key] for part in parts], -1) for key in ("clean", "ablated", "tokens"))
    return TextNLL(clean, ablated.where(wanted, torch.nan), tokens, sum(int(part["passes"]) for part in parts))


def _batch(
    model: Any,
    saes: Mapping[str, SAE],
    order: Sequence[str],
    removed: Mapping[str, Tensor],
    batch: Sequence[TokenizedText],
    wanted: Tensor,
    batch_tokens: int,
    device: torch.device,
) -> dict[str, Tensor]:
    """`clean`, `tokens` `[texts]`, `ablated` `[conditions, texts]` and `passes` of one batch of texts, on the CPU."""
    ids, mask = (t.to(device) for t in pad(batch))
    special = torch.tensor([text.special for text in batch], device=device)
    own = mask.bool() & (torch.arange(ids.shape[1], device=device) >= special.unsqueeze(1))
    clean, start, hidden = _clean_pass(model, saes, order, removed, ids, mask, special, own)
    ablated = clean.expand(len(wanted), -1).clone()
    rows_at_once = max(1, batch_tokens // ids.shape[1])
    passes = 0
    for layer in hidden:
        condition, text = (wanted & (start == layer)).nonzero(as_tuple=True)
        passes += len(text)
        later = [name for name in order if hooks.layer_of(name) >= layer]
        for c, t in zip(torch.split(condition, rows_at_once), torch.split(text, rows_at_once), strict=True):
            edits = {name: remove(saes[name], removed[name][c], own[t]) for name in later}
            with hooks.starting_at(model, layer, hidden[layer][t]), hooks.editing(model, edits):
                ablated[c, t] = text_nll(model, ids[t], mask[t], special[t])
    tokens = targets(mask, special).sum(1)
    part = {"clean": clean, "ablated": ablated, "tokens": tokens, "passes": torch.tensor(passes)}
    return {key: value.cpu().contiguous() for key, value in part.items()}


def _clean_pass(
    model: Any,
    saes: Mapping[str, SAE],
    order: Sequence[str],
    removed: Mapping[str, Tensor],
    ids: Tensor,
    mask: Tensor,
    special: Tensor,
    own: Tensor,
) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
    """Clean NLL `[texts]`, the block at which each (condition, text) pair must start (-1: none), and its input."""
    start = torch.full((len(next(iter(removed.values()))), len(ids)), -1, device=ids.device)

    def look(name: str) -> hooks.Edit:
        def edit(x: Tensor) -> Tensor:
            values, indices = saes[name].encode(x[own].float())
            text = own.nonzero()[:, 0].unsqueeze(1).expand_as(indices)[values > 0]
            fires = torch.zeros((len(ids), removed[name].shape[1]), device=x.device)
            fires[text, indices[values > 0]] = 1.0
            hit = (removed[name].float() @ fires.T) > 0
            start[hit & (start < 0)] = hooks.layer_of(name)
            return x

        return edit

    layers = sorted({hooks.layer_of(name) for name in order})
    with ExitStack() as stack:
        hidden = stack.enter_context(hooks.block_inputs(model, layers))
        stack.enter_context(hooks.editing(model, {name: look(name) for name in order}))
        clean = text_nll(model, ids, mask, special)
        return clean, start, dict(hidden)
