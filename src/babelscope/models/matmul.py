"""The one dense product: oneDNN's float32 kernels on a CPU, twice as fast as MKL's on AMD processors; and its shapes.

Measured on 2 cores of an AMD EPYC (Zen 5), `[1024, 576] @ [576, 1536]`: 500 against 220 GFLOP/s, both exact to 4e-7;
`benchmarks/matmul.py` repeats it.
"""

import functools
import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

# oneDNN keeps the kernels that it compiled for the last 1,024 shapes. Where shapes hardly ever come twice, 64 do as
# well, in less memory (`benchmarks/matmul.py`). Read at the first product.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias` as `torch.nn.functional.linear` computes it, without gradients where oneDNN is used.

    Parameters
    ----------
    x: `[..., d]`.
    weight: `[n, d]`.
    bias: `[n]` or null.
    """
    plain = x.device.type != "cpu" or x.dtype != torch.float32 or weight.dtype != torch.float32 or not x.numel()
    needs_gradient = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if plain or needs_gradient or (onednn := _onednn()) is None:
        return F.linear(x, weight, bias)
    product: Tensor = onednn(x, weight, bias, "none", [], "")
    return product


@functools.cache
def _onednn() -> Any:
    """The product of oneDNN; null where this PyTorch has none or, since the operator is private, another one."""
    ones = torch.ones(2, 2)
    try:
        product = torch.ops.mkldnn._linear_pointwise
        works = torch.equal(product(ones, ones, torch.ones(2), "none", [], ""), torch.full((2, 2), 3.0))
    except (AttributeError, RuntimeError, TypeError):
        works = False
    return product if works else None


def use_in(model: nn.Module) -> None:
    """Let every plain `nn.Linear` of a model compute its product here."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.forward = functools.partial(_forward, module)  # type: ignore[method-assign]


def _forward(module: nn.Linear, x: Tensor) -> Tensor:
    return linear(x, module.weight, module.bias)


def pad_rows(x: Tensor, multiple: int = 64) -> Tensor:
    """`x` `[rows, ...]` with its last row again and again behind it, so that its number of rows is one of few.

    For passes over parts of texts: hardly ever have two the same number of tokens, and blocks of ever different sizes
    leave the heap full of gaps (docs/reliability.md). What the rows behind come to is thrown away; copies, since an SAE
    that has not learned from zeros may fire all over on them.

    Parameters
    ----------
    multiple: a power of two; up to it rows become the next power of two, and multiples of it above.
    """
    rows = len(x)
    wanted = -(-rows // multiple) * multiple if rows > multiple else 1 << (rows - 1).bit_length()
    return torch.cat([x, x[-1:].expand(wanted - rows, *x.shape[1:])]) if 0 < rows < wanted else x
