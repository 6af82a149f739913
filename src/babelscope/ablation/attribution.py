"""What every unit contributes to the effect of removing a language's units, estimated by one backward pass.

    dNLL(u) ~ -sum_t z_u(x_t) W_dec[u] . g_t,    g_t = d NLL / d x_t

To first order, removing unit u changes the activation `x_t` of token t by `-z_u(x_t) W_dec[u]`, and the NLL of the text
by the scalar product of this change with the gradient of the text's NLL at the hookpoint (Nanda 2023, "Attribution
patching"). At the unchanged activations this says little about the removal of many units, whose effect is far from
linear. So the gradient is taken half-way, where half of the parts of all of the language's units is removed: by the
midpoint rule for the integral of the gradient along this path, the contributions sum to about the effect of removing
all (integrated gradients; Sundararajan et al. 2017, arXiv 1703.01365; for latents of SAEs Marks et al. 2024, arXiv
2403.19647).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from babelscope.models import hookpoints as hooks
from babelscope.models.nll import backward, head_of, targets
from babelscope.models.tokens import MOST_PADDING, TokenizedText, batches, pad
from babelscope.sae.autoencoder import SAE
from babelscope.sae.cache import CachedSAE, SAECache


@torch.no_grad()
def attribute(
    model: Any,
    saes: Mapping[str, SAE] | SAECache,
    texts: Sequence[TokenizedText],
    group: Sequence[int],
    groups: int,
    batch_tokens: int,
    *,
    removed: Mapping[str, Tensor] | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> dict[str, Tensor]:
    """Estimate the change of the NLL per token by the removal of each unit (see `interventions.FeatureAblation`).

    Parameters
    ----------
    model: a causal language model, its parameters frozen.
    saes: by hookpoint; no transcoders.
    texts: in `by_length` order.
    group: of each text, a number below `groups`; effects are means over the target tokens of a group.
    batch_tokens: tokens in one pass, including padding.
    removed: by hookpoint, bool `[groups, latents]`: the units of which half is removed from the texts of each group
        where the gradient is taken; None: none.
    advance: called with the number of target tokens after every batch.

    Returns
    -------
    Nats/token, float64 `[groups, latents]` by hookpoint; NaN for a group without target tokens.
    """
    head_of(model)  # probed now, without hooks, and cached
    codes = torch.tensor(group)
    sums = {name: torch.zeros((groups, len(saes[name].W_dec)), dtype=torch.float64) for name in saes}
    count, first = torch.zeros(groups, dtype=torch.int64), 0
    device = hooks.device_of(model)
    for batch in batches(texts, batch_tokens, MOST_PADDING):
        ids, mask = (t.to(device) for t in pad(batch))
        special = torch.tensor([text.special for text in batch], device=device)
        target, code = targets(mask, special), codes[first : first + len(batch)]
        content = mask.bool() & (torch.arange(ids.shape[1], device=device) >= special.unsqueeze(1))
        passed: dict[str, Tensor] = {}
        of = code.to(device).unsqueeze(1).expand_as(content)[content]

        def watch(
            x: Tensor, name: str, passed: dict[str, Tensor] = passed, content: Tensor = content, of: Tensor = of
        ) -> Tensor:
            passed[name] = x if x.requires_grad else x.detach().requires_grad_()
            passed[name].retain_grad()  # type: ignore[no-untyped-call]
            changed = passed[name].clone()  # some blocks later change their modules' outputs in place
            if removed is not None:
                part = _part(saes[name], x.detach()[content], removed[name].to(device)[of])
                changed[content] -= 0.5 * part.to(x.dtype)
            return changed

        with hooks.editing(model, {name: lambda x, name=name: watch(x, name) for name in saes}):  # type: ignore[misc]
            backward(model, ids, mask, target)
        for name, x in passed.items():
            assert x.grad is not None
            _add(sums[name], saes[name], x.detach()[content], x.grad[content], of)
        count.index_add_(0, code, target.sum(1).cpu())
        first += len(batch)
        advance(int(target.sum()))
    return {name: total / count.unsqueeze(1) for name, total in sums.items()}


def _part(sae: SAE | CachedSAE, x: Tensor, chosen: Tensor) -> Tensor:
    """The part of the reconstruction of `x` `[tokens, d]` by the units `chosen`, bool `[tokens, latents]`."""
    values, indices = sae.encode(x)
    values = values.where(chosen.gather(1, indices), 0.0)
    return functional.embedding_bag(indices, sae.W_dec.detach(), per_sample_weights=values, mode="sum")


def _add(sums: Tensor, sae: SAE | CachedSAE, x: Tensor, gradient: Tensor, group: Tensor) -> None:
    """Add to `sums` `[groups, latents]` the effects on tokens with the activations `x` and `gradient` `[tokens, d]`."""
    values, indices = sae.encode(x)
    for value, index in zip(values.T, indices.T, strict=True):  # one column at a time, so that memory stays small
        effect = -value.double() * (sae.W_dec[index] * gradient.float()).sum(1).double()
        sums.view(-1).index_add_(0, (group * sums.shape[1] + index).cpu(), effect.cpu())
