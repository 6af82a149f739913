"""The update of the decoder, whose rows keep norm 1: gradient projected, Adam's step, rows scaled."""

import functools
import logging

import torch
from torch import Tensor, nn
from torch.nn import functional

from babelscope.sae.kernels import fused
from babelscope.sae.training.schedule import BETAS

log = logging.getLogger(__name__)

# Rows projected at once, which bounds the memory.
_CHUNK = 4096
# Rows on which the two updates are compared, and the largest difference allowed, as a share of a row's norm. Rounding
# makes up to 1e-6, since sums of d products are added in another order.
_ROWS, _TOLERANCE = 8, 1e-5


def take_off_parallel_(gradient: Tensor, W_dec: Tensor) -> None:
    """Project every row of `gradient` [n, d] orthogonally to the same row of `W_dec`, in place."""
    if kernels := fused(gradient):
        kernels.take_off_parallel_(gradient, W_dec)
        return
    for first in range(0, len(gradient), _CHUNK):
        g, w = gradient[first : first + _CHUNK], W_dec[first : first + _CHUNK]
        g.addcmul_((g * w).sum(1, keepdim=True), w, value=-1)


def normalise_(W_dec: Tensor) -> None:
    """Scale the rows of `W_dec` [n, d] to norm 1, in place."""
    if kernels := fused(W_dec):
        kernels.normalise_(W_dec)
    else:
        W_dec.div_(W_dec.norm(dim=1, keepdim=True))


def update_(W_dec: nn.Parameter, optimizer: torch.optim.Optimizer) -> bool:
    """Do all of `W_dec`'s update in one pass on a GPU, and delete its gradient, so that `optimizer` skips it.

    On a CPU, or if the kernel fails or differs from the three passes on this device, it changes nothing and returns
    False.

    Parameters
    ----------
    W_dec: float32 [n, d], with a gradient.
    optimizer: torch's fused Adam or AdamW, without weight decay of `W_dec`; its state becomes that after its own step.
    """
    if not fused(W_dec) or not _agrees(W_dec.device, W_dec.shape[1]):
        return False
    _in_one_pass(W_dec, optimizer)
    return True


def _in_one_pass(W_dec: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    [group] = [group for group in optimizer.param_groups if any(weight is W_dec for weight in group["params"])]
    state = optimizer.state[W_dec]
    if not state:
        state["step"] = torch.zeros((), device=W_dec.device)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(W_dec), torch.zeros_like(W_dec)
    state["step"] += 1
    settings = group["lr"], group["betas"], group["eps"]
    fused(W_dec).update_rows_(W_dec, W_dec.grad, state["exp_avg"], state["exp_avg_sq"], state["step"], *settings)
    W_dec.grad = None


def _in_three_passes(W_dec: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    assert W_dec.grad is not None
    take_off_parallel_(W_dec.grad, W_dec)
    optimizer.step()
    normalise_(W_dec)


@functools.cache
def _agrees(device: torch.device, d: int) -> bool:
    """Whether the two updates of a few random rows of this width agree; the kernel is compiled for every width.

    The rows' gradients have different sizes, from 1 down to Adam's epsilon, so that the epsilon counts as well.
    """
    size = torch.logspace(0, -8, _ROWS)[:, None]
    W_dec, gradient, mean, deviation = torch.randn(4, _ROWS, d, generator=torch.Generator().manual_seed(0))
    square = (deviation.square() + 1) * size.square()
    start = [each.to(device) for each in (functional.normalize(W_dec), gradient * size, mean * size, square)]
    results = []
    try:
        for update in (_in_three_passes, _in_one_pass):
            W_dec, gradient, mean, square = (each.clone() for each in start)
            weight = nn.Parameter(W_dec)
            weight.grad = gradient
            optimizer = torch.optim.AdamW([weight], lr=0.01, betas=BETAS, weight_decay=0.0, fused=True)
            step = torch.full((), 3.0, device=device)
            optimizer.state[weight] = {"step": step, "exp_avg": mean, "exp_avg_sq": square}
            update(weight, optimizer)
            results.append([W_dec, mean, square])
    except Exception as error:  # of any kind: the plain update works without the kernel
        log.debug("the decoder is updated in three passes, since the kernel failed: %s", error)
        return False
    agree = all(
        bool(((a - b).norm(dim=1) <= _TOLERANCE * a.norm(dim=1)).all()) for a, b in zip(*results, strict=True)
    )  # fmt: skip
    if not agree:
        log.debug("the decoder is updated in three passes, since the kernel's results differ on this device")
    return agree
