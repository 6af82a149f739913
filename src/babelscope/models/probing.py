"""What is measured on a model before it is relied on, by passes over a few tokens: names do not tell it.

Each probe answers "no" if the model raises anything on the way: the slower way, which needs no such property, is taken.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from babelscope.models import hookpoints as hooks
from babelscope.models.names import layer_of

# Texts and tokens of a probe: few, and no more positions than any model has.
_TEXTS, _TOKENS = 16, 8
# The largest root mean square of a relative error that rounding explains: in float32, and in steps (eps) of a less
# precise dtype.
_ROUNDING, _STEPS = 1e-3, 4.0


def probe_ids(model: Any, texts: int = _TEXTS, tokens: int = _TOKENS) -> Tensor:
    """Token ids `[texts, tokens]` (int64), all different if the vocabulary is large enough, on the model's device."""
    vocabulary = int(model.config.get_text_config().vocab_size)
    number = torch.arange(texts * tokens, device=hooks.device_of(model))
    return ((number * 7919 + 1) % vocabulary).view(texts, tokens)


def agree(found: Tensor, wanted: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether two results of the same computation in `dtype` (by default theirs) differ by rounding only.

    Each error is relative to the larger of the value and the typical size of its dimension (the last): in a residual
    stream a few dimensions, and a few tokens, are a thousand times as large as all others, and would hide their errors.
    """
    if found.shape != wanted.shape:
        return False
    tolerance = max(_ROUNDING, _STEPS * torch.finfo(dtype or wanted.dtype).eps)
    found, wanted = (x.float().reshape(-1, x.shape[-1]) for x in (found, wanted))
    size = wanted.abs().median(0).values
    size = torch.maximum(wanted.abs(), size.clamp_min(float(size.median()) * 1e-2)).clamp_min(1e-30)
    return bool(((found - wanted) / size).square().mean().sqrt() <= tolerance)


@torch.inference_mode()
def can_restart(model: Any, layers: Sequence[int]) -> bool:
    """Whether a pass that starts before each of `layers` with the residual stream read there is the whole pass.

    It is not if blocks hand on more than one residual stream, or not as `[batch, tokens, d]` (Gemma 3n), or if upper
    blocks use what lower ones computed. The texts change places, so that what a model keeps of its last pass is found.
    """
    ids = probe_ids(model, 2)
    mask, order = torch.ones_like(ids), [1, 0]
    try:
        with hooks.block_inputs(model, layers) as inputs:
            whole = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        hidden = dict(inputs)
        for layer in layers:
            with hooks.starting_at(model, layer, hidden[layer][order]):
                logits = model(input_ids=ids[order], attention_mask=mask, use_cache=False).logits
            if not agree(logits, whole[order]):
                return False
    except Exception:  # whatever a foreign model raises here
        return False
    return True


@torch.inference_mode()
def stays_in_place(model: Any, hookpoint: str) -> bool:
    """Whether a change at one token's hookpoint reaches other tokens only in the blocks above.

    It is so behind the block's attention: the change is made, and the block's outputs at all other tokens must be the
    same bit for bit.
    """
    ids = probe_ids(model, 2)
    layers, is_seen = range(layer_of(hookpoint) + 1), []
    # The first token, which most attentions look at, and one in the middle.
    places = [(0, 0), (1, _TOKENS // 2)]

    def change(x: Tensor) -> Tensor:
        is_seen.append(x.shape[:2] == ids.shape)
        if not is_seen[-1]:
            return x
        changed, draw = x.clone(), torch.Generator().manual_seed(0)
        for place in places:
            noise = torch.randn(x[place].shape, generator=draw).to(x)
            changed[place] += noise * (1 + x[place].float().square().mean().sqrt()).to(x)
        return changed

    try:
        clean = hooks.run_blocks(model, layers, None, input_ids=ids)
        with hooks.editing(model, {hookpoint: change}):
            other = hooks.run_blocks(model, layers, None, input_ids=ids)
        # Some families hand on several residual streams, `[streams, batch, tokens, d]`.
        same = (clean == other).reshape(-1, *clean.shape[-3:]).all(-1).all(0)
        for place in places:
            same[place] = True
        return is_seen == [True] and same.shape == ids.shape and bool(same.all())
    except Exception:  # whatever a foreign model raises here
        return False
