"""The logit lens of a direction: the tokens that become more probable if it is added to the residual stream."""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from babelscope.core.errors import UserError
from babelscope.models import hookpoints as hooks
from babelscope.models.matmul import linear

# Directions unembedded at once: 256 x 49k float32 logits are 50 MB.
_ROWS = 256
# Minimum cosine between the change of the logits and the lens: it is 1 up to rounding if the lens is right.
_ALIKE = 0.95


def direct_logits(model: Any, directions: Tensor) -> Iterator[Tensor]:
    """The linearised direct effect of directions in the residual stream on the logits.

    This is the logit lens (nostalgebraist 2020) for decoder directions: `W_U (g * v)` with the unembedding W_U, the
    gain g of the final norm, and the direction v, which is centred first if the norm subtracts the mean (LayerNorm).

    It ignores the effects that depend on the text: the norm's division by the size of the residual stream (a positive
    factor that is the same for all tokens and keeps their order), and the effect of later blocks. It also ignores soft
    caps and scales of the logits, and norms of a module's output before it is added to the stream (Gemma 2).

    Parameters
    ----------
    directions: float32 `[n, d]`, d the width of the residual stream.

    Yields
    ------
    Float32 `[at most 256, vocabulary]`, in the order of `directions`.

    Raises
    ------
    UserError: the model's logits do not change in this way, as `_moves_as` measures.
    """
    weight: Tensor = model.get_output_embeddings().weight.float()
    gain, centred = final_norm(model)
    if not _moves_as(model, weight, gain, centred):
        raise UserError(
            f"params.yaml: model.name: {type(model).__name__} has no logit lens: more than a norm and the unembedding "
            "lies between its blocks and its logits"
        )
    for first in range(0, len(directions), _ROWS):
        rows = directions[first : first + _ROWS].float()
        if centred:
            rows = rows - rows.mean(1, keepdim=True)
        yield linear(rows * gain, weight)


def width(model: Any) -> int:
    """The width d of the residual stream, as the unembedding reads it."""
    return int(model.get_output_embeddings().weight.shape[1])


@torch.no_grad()
def _moves_as(model: Any, weight: Tensor, gain: Tensor, centred: bool) -> bool:
    """Whether a direction in the residual stream after the last block changes the logits as the lens predicts.

    The direction is added to an orthogonal stream with either sign, so that the norm divides both by the same size. The
    logits are the unembedding's output, before any caps.
    """
    d, device = weight.shape[1], weight.device
    stream, direction = torch.randn(2, d, generator=torch.Generator().manual_seed(0)).to(device)
    stream, direction = stream - stream.mean(), direction - direction.mean()
    stream = stream - (stream @ direction) / (direction @ direction) * direction
    lens = linear((direction * gain).unsqueeze(0), weight)[0]
    seen: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        seen.append(output)

    with ExitStack() as stack:
        stack.callback(model.get_output_embeddings().register_forward_hook(keep).remove)
        try:
            both = torch.stack([stream + direction, stream - direction]).to(next(model.parameters()).dtype)
            logits = hooks.logits_of(model, both)
            logits = seen[-1].reshape(logits.shape) if seen else logits
            moved = (logits[0] - logits[1]).float()
        except Exception:  # a model with custom code may raise any error
            return False
    return float(torch.nn.functional.cosine_similarity(moved, lens, dim=0)) > _ALIKE


@torch.no_grad()
def final_norm(model: Any) -> tuple[Tensor, bool]:
    """The gain of the norm before the unembedding, float32 `[d]`, and whether the norm subtracts the mean.

    Both are measured, since families name their norms and define their gains (`g`, `1 + g`) differently. A model
    without such a norm has a gain of 1.
    """
    d, device = width(model), hooks.device_of(model)
    norm = _last_norm(model, d)
    if norm is None:
        return torch.ones(d, device=device), False
    dtype = next(model.parameters()).dtype
    # The probe has mean 0, so both kinds of norm only rescale it.
    probe = torch.ones(d, device=device)
    probe[1::2] = -1
    if d % 2:
        probe[-3:] = torch.tensor([1.0, 1.0, -2.0], device=device)
    size = probe.square().mean().sqrt()
    at_zero, at_ones, at_probe = norm(torch.stack([0 * probe, probe.abs() * 0 + 1, probe]).unsqueeze(0).to(dtype))[0]
    gain = (at_probe - at_zero).float() * size / probe
    return gain, torch.allclose(at_ones, at_zero)


def _last_norm(model: Any, d: int) -> nn.Module | None:
    """The last module run after the blocks that has a gain `[d]` or is a norm without one (OLMo's)."""
    blocks = hooks.blocks(model)
    inside = {id(module) for block in blocks for module in block.modules()}
    ran: list[nn.Module] = []

    def note(module: nn.Module, _inputs: Any, _output: Any) -> None:
        ran.append(module)

    with ExitStack() as stack:
        stack.callback(blocks[-1].register_forward_hook(lambda *_: ran.clear()).remove)
        for module in model.modules():
            shapes = {tuple(p.shape) for p in module.parameters(recurse=False)}
            has_no_gain = not shapes and "norm" in type(module).__name__.lower()
            if id(module) not in inside and (has_no_gain or shapes == {(d,)}):
                stack.callback(module.register_forward_hook(note).remove)
        model(input_ids=torch.zeros((1, 1), dtype=torch.int64, device=hooks.device_of(model)), use_cache=False)
    return ran[-1] if ran else None
