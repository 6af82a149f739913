"""Dense products by oneDNN's float32 kernels on a CPU, which are twice as fast as MKL's on AMD processors.

On 2 cores of an AMD EPYC (Zen 5), `[1024, 576] @ [576, 1536]` ran at 500 instead of 220 GFLOP/s, both exact to 4e-7
(`benchmarks/matmul.py`).
"""

import functools
import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

# oneDNN caches compiled kernels for the last 1,024 shapes. Since most shapes occur only once, 64 are as fast and take
# less memory (`benchmarks/matmul.py`). oneDNN reads the variable at the first product.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`, by oneDNN for float32 on a CPU without gradients, else by `torch.nn.functional.linear`.

    Parameters
    ----------
    x: `[..., d]`.
    weight: `[n, d]`.
    bias: `[n]` or None.
    """
    plain = x.device.type != "cpu" or x.dtype != torch.float32 or weight.dtype != torch.float32 or not x.numel()
    needs_gradient = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if plain or needs_gradient or (onednn := _onednn()) is None:
        return F.linear(x, weight, bias)
    product: Tensor = onednn(x, weight, bias, "none", [], "")
    return product


@functools.cache
def _onednn() -> Any:
    """PyTorch's private operator for oneDNN's product; None if it is missing or has changed."""
    ones = torch.ones(2, 2)
    try:
        product = torch.ops.mkldnn._linear_pointwise
        works = torch.equal(product(ones, ones, torch.ones(2), "none", [], ""), torch.full((2, 2), 3.0))
    except (AttributeError, RuntimeError, TypeError):
        works = False
    return product if works else None


def use_in(model: nn.Module) -> None:
    """Let every plain `nn.Linear` of a model compute its product by `linear`."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.forward = functools.partial(_forward, module)  # type: ignore[method-assign]


def _forward(module: nn.Linear, x: Tensor) -> Tensor:
    return linear(x, module.weight, module.bias)


def pad_rows(x: Tensor, multiple: int = 64) -> Tensor:
    """Pad `x` `[rows, ...]` with copies of its last row, so that few different numbers of rows occur.

    Passes over parts of texts rarely have the same number of tokens, and blocks of many different sizes fragment the
    heap (docs/reliability.md). Callers discard the results of the padding. The padding consists of copies, since many
    latents of an SAE may fire on zeros, on which it was not trained.

    Parameters
    ----------
    multiple: a power of two. Up to it, the number of rows becomes the next power of two; above, a multiple of it.
    """
    rows = len(x)
    wanted = -(-rows // multiple) * multiple if rows > multiple else 1 << (rows - 1).bit_length()
    return torch.cat([x, x[-1:].expand(wanted - rows, *x.shape[1:])]) if 0 < rows < wanted else x
