"""Private functions of PyTorch, each with a fallback for versions that lack it (`matmul` has oneDNN's product)."""

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

Dots = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@functools.cache
def multiplies_bfloat16(cpu_info: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the CPU multiplies bfloat16 in hardware.

    Parameters
    ----------
    cpu_info: description of the processor on Linux, read if PyTorch lacks the function; if it is missing, False.
    """
    try:
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    except AttributeError:
        flags = set(cpu_info.read_text().split()) if cpu_info.is_file() else set()
        return bool(flags & {"avx512_bf16", "amx_tile"})


@functools.cache
def gathered_dots() -> Dots | None:
    """A function for `(a[i] * b[j]).sum(1)` on the CPU without the gathered copies; None if PyTorch lacks the kernel.

    The kernel computes embedding_bag's gradient for its weights; its "offsets" are unused in mode 0 (sum).
    """

    def dots(a: Tensor, b: Tensor, i: Tensor, j: Tensor) -> Tensor:
        found: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(a, b, j, i, i, 0)
        return found

    rows, index = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1, 0])
    try:
        works = torch.equal(dots(rows, rows, index, index.flip(0)), torch.tensor([11.0, 11.0]))
    except (AttributeError, RuntimeError, TypeError):
        works = False
    return dots if works else None
