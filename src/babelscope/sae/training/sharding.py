"""Sharded weights (FSDP): each device keeps some rows of every weight, of its gradient and of Adam's moments.

The forward and backward pass use full weights. Everything after them treats each row separately, so every device works
on the rows that it keeps. Functions return plain tensors unchanged.
"""

from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor


def shard(module: nn.Module, method: str, mesh: Any) -> None:
    """Shard the weights of `module` over the devices of `mesh`, as FSDP; its `method` runs on full weights.

    Gradients are averaged over the devices, as in DDP.
    """
    fully_shard(module, mesh=mesh, reshard_after_forward=False)
    register_fsdp_forward_method(module, method)


def local(tensor: Tensor) -> Tensor:
    """The rows that this device keeps (a view)."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """All rows; every device must call this at the same time."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def add_rows_(tensor: Tensor, rows: Tensor, values: Tensor) -> None:
    """Add `values` [m, ...] to the rows numbered `rows` [m] of the full `tensor`, on the devices that keep them."""
    kept = local(tensor)
    if isinstance(tensor, DTensor):
        size = -(-len(tensor) // tensor.device_mesh.size())
        first = size * tensor.device_mesh.get_local_rank()
        inside = (rows >= first) & (rows < first + len(kept))
        rows, values = rows[inside] - first, values[inside]
    kept.index_add_(0, rows, values)
