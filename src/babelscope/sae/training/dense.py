"""The training step of SAEs without a fixed number of active latents: ReLU with an L1 penalty, and JumpReLU with L0.

Early in training half of the latents fire, so a sparse computation would gain nothing. The forward pass computes the
gradients for one chunk of rows after the other, and never keeps anything of size batch x latents.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from babelscope.sae.autoencoder import SAE, chunk_rows
from babelscope.sae.training.step import Step

# Width of the kernel in the threshold's pseudo-derivative, in units of scores (the inputs' mean squared norm is d).
_BANDWIDTH = 0.1


def dense_step(
    sae: SAE, x: Tensor, y: Tensor | None = None, *, log_threshold: Tensor | None = None, sparsity: Tensor
) -> Step:
    """Forward pass whose `loss.backward()` gives the gradients of the weights and of `log_threshold`.

    Parameters
    ----------
    sae: SAE with float32 weights; its `threshold` is not used.
    x: float32 [rows, d_in], rows >= 1; no gradient flows to it.
    y: float32 [rows, d], activations to reconstruct (transcoders); None: x.
    log_threshold: [n], logarithms of JumpReLU's thresholds; their gradient is the pseudo-derivative of
        Rajamanoharan et al. 2024 (arXiv 2407.14435, eq. 11 and 12). None: ReLU.
    sparsity: scalar, weight of the penalty in the loss. The penalty is the mean over rows of the number of active
        latents (JumpReLU) or of the sum of activations (ReLU; decoder rows have norm 1).
    """
    apply: Any = _Dense.apply
    weights = sae.encoder, sae.W_dec, sae.b_enc, sae.b_dec
    return Step(*apply(x, x if y is None else y, *weights, log_threshold, sae.b_in, sparsity))


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        *weights, b_in, sparsity = inputs
        leaves = [None if weight is None else weight.detach().requires_grad_() for weight in weights]
        wanted = [leaf for leaf in leaves if leaf is not None]
        gradients = [torch.zeros_like(leaf) for leaf in wanted]
        n = len(wanted[0])
        loss, active, activity, errors = x.new_zeros(()), x.new_zeros(()), x.new_zeros(n), []
        size = chunk_rows(n, x.device)
        for first in range(0, len(x), size):
            with torch.enable_grad():
                rows = slice(first, first + size)
                part, error, z = _chunk(x[rows], y[rows], leaves, b_in, sparsity)
                part = part / len(x)
                for total, gradient in zip(gradients, torch.autograd.grad(part, wanted), strict=True):
                    total += gradient
            loss += part.detach()
            activity += z.sum(0)
            active += (z > 0).sum()
            errors.append(error)
        ctx.gradients = iter(gradients)
        ctx.given = [leaf is not None for leaf in leaves]
        error, l0 = torch.cat(errors), active / len(x)
        min_activation = torch.zeros_like(l0)
        ctx.mark_non_differentiable(error, activity, l0, min_activation)
        ctx.set_materialize_grads(False)
        return loss, error, activity, l0, min_activation

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        gradients = [next(ctx.gradients).mul_(grad) if given else None for given in ctx.given]
        return None, None, *gradients, None, None


def _chunk(x: Tensor, y: Tensor, leaves: list[Any], b_in: Any, sparsity: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Summed loss, error [rows, d] and activations [rows, n] (both constants) of some rows."""
    encoder, W_dec, b_enc, b_dec, log_threshold = leaves
    scores = functional.linear(x - (b_dec if b_in is None else b_in), encoder, b_enc)
    if log_threshold is None:
        z = scores.relu()
        penalty = z.sum()
    else:
        jump, count = _JumpReLU.apply(scores, log_threshold.exp())  # type: ignore[no-untyped-call]
        z, penalty = jump, count.sum()
    error = functional.linear(z, W_dec.T, b_dec) - y
    return error.square().sum() + sparsity * penalty, error.detach(), z.detach()


class _JumpReLU(torch.autograd.Function):
    """JumpReLU of `scores` and the step function at `threshold`, with pseudo-derivatives for the threshold."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
        on = (scores > threshold).to(scores.dtype)
        ctx.save_for_backward(scores, threshold, on)
        return scores * on, on

    @staticmethod
    def backward(ctx: Any, grad_z: Tensor, grad_on: Tensor) -> tuple[Tensor, Tensor]:
        scores, threshold, on = ctx.saved_tensors
        near = ((scores - threshold).abs() < _BANDWIDTH / 2).to(scores.dtype).div_(_BANDWIDTH)
        return grad_z * on, -((threshold * grad_z + grad_on) * near).sum(0)
