"""Weights cut into pieces (FSDP): a device keeps some rows of every weight, of its gradient and of Adam's moments.

For a forward pass and its gradients the weights are put together; what is done with them afterwards is done to each
row by itself, and so by every device to its own. On whole tensors all of this does nothing.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(module: nn.Module, method: str, mesh: Any) -> None:
    """Cut the weights of `module` among the devices of `mesh`; its `method` finds them whole, and so do its gradients.

    Gradients are averaged over the devices, as by DDP.
    """
    fully_shard(module, mesh=mesh, reshard_after_forward=False)
    register_fsdp_forward_method(module, method)


def own(tensor: Tensor) -> Tensor:
    """The rows that this device keeps (a view)."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All rows; every device has to ask for them at the same time."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def add_rows_(tensor: Tensor, rows: Tensor, values: Tensor) -> None:
    """Add `values` [m, ...] to the rows numbered `rows` [m] of the whole `tensor`, where they are kept."""
    mine = own(tensor)
    if isinstance(tensor, DTensor):
        size = -(-len(tensor) // tensor.device_mesh.size())
        first = size * tensor.device_mesh.get_local_rank()
        here = (rows >= first) & (rows < first + len(mine))
        rows, values = rows[here] - first, values[here]
    mine.index_add_(0, rows, values)


def cut_moments(optimizer: torch.optim.Optimizer) -> None:
    """Cut what was loaded into `optimizer` whole as its weights are cut."""
    for weight, state in optimizer.state.items():
        if isinstance(weight, DTensor):
            for name, value in state.items():
                if value.shape == weight.shape:
                    state[name] = distribute_tensor(value, weight.device_mesh, weight.placements)
