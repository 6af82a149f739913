"""Top-k, and the Triton kernels for CUDA devices."""

import functools
from importlib.util import find_spec
from typing import Any

from torch import Tensor


def fused(tensor: Tensor) -> Any:
    """Return the module `triton_kernels` if the tensor is on a CUDA device and Triton is installed, else None."""
    return _kernels() if tensor.is_cuda else None


@functools.cache
def _kernels() -> Any:
    if find_spec("triton") is None:
        return None
    from babelscope.sae.kernels import triton_kernels  # on demand: a CPU needs no Triton

    return triton_kernels
