"""Float32 products of chosen pairs of rows."""

import torch
from torch import Tensor

from babelscope.models import compat
from babelscope.sae.kernels import fused

# The vector instructions of a CPU's kernel start at multiples of this number of bytes.
_ALIGNMENT = 64


def dots(a: Tensor, b: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """`(a[i] * b[j]).sum(1)` without the gathered copies; fastest if `i` ascends, since `a` is then read once."""
    if a.device.type == "cpu" and (gathered := compat.gathered_dots()) is not None:
        return gathered(a, b, i, j)
    size = 2**18
    return torch.cat([(a[i[s : s + size]] * b[j[s : s + size]]).sum(1) for s in range(0, len(i), size)])


def has_fixed_dots(a: Tensor) -> bool:
    """Whether `fixed_dots` can multiply rows of this width on this device."""
    if a.device.type == "cpu":
        return a.shape[-1] * a.element_size() % _ALIGNMENT == 0 and compat.gathered_dots() is not None
    return fused(a) is not None


def fixed_dots(a: Tensor, b: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """`dots` whose bits depend on the two rows only, not on the other pairs; see `has_fixed_dots`.

    A CPU's kernel adds in an order that depends on where a row begins in memory, so `a` and `b` must be `aligned`.
    """
    if kernels := fused(a):
        found: Tensor = kernels.dots(a, b, i, j)
        return found
    return dots(a, b, i, j)


def aligned(rows: Tensor) -> Tensor:
    """The same rows, copied unless they begin at a multiple of 64 bytes (a file mapped into memory may not)."""
    return rows.contiguous() if rows.data_ptr() % _ALIGNMENT == 0 else rows.clone(memory_format=torch.contiguous_format)
