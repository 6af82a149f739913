"""Whether a tensor's device has the kernels of `sae.triton_kernels`: CUDA devices, where Triton is installed."""

import functools
from importlib.util import find_spec
from typing import Any

from torch import Tensor


def fused(tensor: Tensor) -> Any:
    """Return the module `sae.triton_kernels` for tensors on a CUDA device with Triton, else None."""
    return _kernels() if tensor.is_cuda else None


@functools.cache
def _kernels() -> Any:
    if find_spec("triton") is None:
        return None
    from babelscope.sae.kernels import triton_kernels  # on demand: a CPU needs no Triton

    return triton_kernels
