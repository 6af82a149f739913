"""Properties of a model that its configuration does not tell, measured by passes over a few tokens.

If the model raises an error in the probe for a faster method, the probe returns False and logs the error, since the
slower method does not need the property.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from babelscope.models import hookpoints as hooks
from babelscope.models.names import layer_of

log = logging.getLogger(__name__)

# Texts of a probe, and tokens in each: no more than any model has positions.
_TEXTS, _TOKENS = 16, 8
# The largest root mean square of relative errors that counts as rounding: in float32, and in steps (eps) of a dtype of
# lower precision.
_ROUNDING, _STEPS = 1e-3, 4.0


def probe_ids(model: Any, texts: int = _TEXTS, tokens: int = _TOKENS) -> Tensor:
    """Token ids `[texts, tokens]` (int64), all different if the vocabulary is large enough, on the model's device.

    The first is from the middle of the vocabulary, since special tokens are at its ends.
    """
    vocabulary = int(model.config.get_text_config().vocab_size)
    number = torch.arange(texts * tokens, device=hooks.device_of(model))
    return ((number * 7919 + vocabulary // 2) % vocabulary).view(texts, tokens)


def agree(found: Tensor, wanted: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether two results of the same computation in `dtype` (by default their own) differ by rounding only.

    Each error is relative to the larger of the value itself and the typical size in its (last) dimension: in a residual
    stream, a few dimensions and a few tokens are a thousand times as large as others, and would hide their errors.
    """
    if found.shape != wanted.shape:
        return False
    tolerance = max(_ROUNDING, _STEPS * torch.finfo(dtype or wanted.dtype).eps)
    found, wanted = (x.float().reshape(-1, x.shape[-1]) for x in (found, wanted))
    size = wanted.abs().median(0).values
    size = torch.maximum(wanted.abs(), size.clamp_min(float(size.median()) * 1e-2)).clamp_min(1e-30)
    return bool(((found - wanted) / size).square().mean().sqrt() <= tolerance)


def declined(model: Any, way: str, error: Exception) -> bool:
    """Log that the model raised `error` in the probe for the method `way`, and return False."""
    log.info("%s: no %s: %s: %.200s", type(model).__name__, way, type(error).__name__, error)
    return False


@torch.inference_mode()
def can_restart(model: Any, layers: Sequence[int]) -> bool:
    """Whether passes that start before each of `layers`, with the residual stream read there, equal the whole pass.

    They do not if blocks pass on several residual streams or another shape than `[batch, tokens, d]` (Gemma 3n), or if
    upper blocks use other results of lower ones. The probe swaps the texts to detect state of an earlier pass.
    """
    ids = probe_ids(model, 2)
    mask, order = torch.ones_like(ids), [1, 0]
    try:
        with hooks.block_inputs(model, layers) as inputs:
            whole = hooks.body_of(model)(input_ids=ids, attention_mask=mask, use_cache=False)[0]
        hidden = dict(inputs)
        for layer in layers:
            with hooks.starting_at(model, layer, hidden[layer][order]):
                found = hooks.body_of(model)(input_ids=ids[order], attention_mask=mask, use_cache=False)[0]
            if not agree(found, whole[order]):
                return False
    except Exception as error:  # a model with custom code may raise any error
        return declined(model, "passes that start at a hookpoint", error)
    return True


@torch.inference_mode()
def stays_in_place(model: Any, hookpoint: str) -> bool:
    """Whether a change at a token's hookpoint affects other tokens only in the blocks above.

    This holds after the block's attention. The probe makes a change and compares the block's output at all other tokens
    bit for bit.
    """
    ids = probe_ids(model, 2)
    layers, is_seen = range(layer_of(hookpoint) + 1), []
    # The first token, to which most heads attend, and one in the middle.
    changed_at = [(0, 0), (1, _TOKENS // 2)]

    def change(x: Tensor) -> Tensor:
        is_seen.append(x.shape[:2] == ids.shape)
        if not is_seen[-1]:
            return x
        changed, draw = x.clone(), torch.Generator().manual_seed(0)
        for at in changed_at:
            noise = torch.randn(x[at].shape, generator=draw).to(x)
            changed[at] += noise * (1 + x[at].float().square().mean().sqrt()).to(x)
        return changed

    try:
        clean = hooks.run_blocks(model, layers, None, input_ids=ids)
        with hooks.editing(model, {hookpoint: change}):
            other = hooks.run_blocks(model, layers, None, input_ids=ids)
        # Some families pass on several residual streams, `[streams, batch, tokens, d]`.
        same = (clean == other).reshape(-1, *clean.shape[-3:]).all(-1).all(0)
        for at in changed_at:
            same[at] = True
        return is_seen == [True] and same.shape == ids.shape and bool(same.all())
    except Exception as error:  # a model with custom code may raise any error
        return declined(model, f"changes in place at {hookpoint}", error)


def reads_ahead(model: Any) -> bool:
    """Whether the model's output at a token depends on later tokens, as in masked language models.

    The probe computes the derivative of the outputs at all tokens but the last by the embedding of the last. In a
    causal model it is 0 in any precision, except for the rounding of convolutions by Fourier transform, so it must
    exceed 1e-4 of the derivative by the tokens' own embeddings. A comparison of two texts that differ in the last token
    would not work: in bfloat16, rounding is as large as a weak dependence, since experts multiply other shapes if a
    token is routed to another expert.

    A model whose code has no derivatives (kernels for inference only) counts as causal.
    """
    ids = probe_ids(model, 1, 4)
    embedded: list[Tensor] = []

    def start_here(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1].clone()  # the model may change it in place

    handle = model.get_input_embeddings().register_forward_hook(start_here)
    try:
        with torch.enable_grad():
            body = getattr(model, "base_model", model)
            seen = body(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)[0]
            # The outputs are weighted, since a layer norm keeps their plain sum constant.
            weights = torch.arange(seen.shape[-1], device=seen.device).sin()
            (gradient,) = torch.autograd.grad((seen[:, :-1].float() * weights).sum(), embedded[0])
    except (RuntimeError, IndexError) as error:
        log.warning("%s: cannot check whether it is causal: %.200s", type(model).__name__, error)
        return False
    finally:
        handle.remove()
    # Some models have the dimension of tokens before that of texts.
    by_token = gradient.float().reshape(ids.shape[1], -1).norm(dim=1)
    return bool(by_token[-1] > 1e-4 * by_token[:-1].max())
