"""The `hardware` section: the device for work on one, and Lightning's trainer for work that may be distributed."""

import ctypes
import logging
import sys
import warnings
from typing import Any

import torch

from babelscope.config.schema import Hardware
from babelscope.core.errors import UserError

# Of glibc's malloc.h: blocks below 32 MiB come from the heap, of which 256 MiB are kept. Left to itself, glibc
# had training take up to half as much memory again, and `ablate` a quarter.
_MALLOPT = {-3: 2**25, -1: 2**28}  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD


def prepare(hardware: Hardware) -> torch.device:
    """Set the number of CPU threads and how memory is kept, and return the device: the accelerator, else the CPU.

    Raises
    ------
    UserError: the accelerator that is asked for is not there.
    """
    keep_freed_memory()
    if hardware.threads:
        torch.set_num_threads(hardware.threads)
    has_gpu = torch.cuda.is_available()
    if hardware.accelerator == "gpu" and not has_gpu:
        raise UserError("params.yaml: hardware.accelerator: no 'gpu' here; allowed: auto, cpu")
    return torch.device("cuda" if has_gpu and hardware.accelerator != "cpu" else "cpu")


def keep_freed_memory() -> None:
    """Let this process keep memory that it frees; does nothing where the C library is not glibc.

    glibc hands large blocks back to the system as soon as they are free, and every training step asks for the same ones
    again: 1,400 page faults a step, a twentieth of its time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for parameter, value in _MALLOPT.items():
            mallopt(parameter, value)


def trainer(hardware: Hardware, **options: Any) -> Any:
    """A Lightning `Trainer` for the section that writes, prints and shuffles nothing by itself.

    Parameters
    ----------
    hardware: accelerator, devices, nodes and strategy.
    options: further arguments of the `Trainer`.

    Raises
    ------
    UserError: the section asks for devices or a strategy that are not there.
    """
    from lightning.pytorch import Trainer
    from lightning.pytorch.strategies import ModelParallelStrategy
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # the import sets it to INFO
    # Lightning 2.6 under torch 2.13: its own call of a deprecated function.
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated")
    # Reading is in the calling thread on purpose (`sae.batches`), and there is nothing to read in a forward pass.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    accelerator = "gpu" if prepare(hardware).type == "cuda" else "cpu"
    strategy: Any = hardware.strategy
    if strategy == "fsdp":  # Lightning's strategy of that name is the older FSDP, which knows no CPU
        strategy = ModelParallelStrategy(hardware.devices * hardware.num_nodes, 1)
    try:
        return Trainer(
            accelerator=accelerator,
            devices=hardware.devices,
            num_nodes=hardware.num_nodes,
            strategy=strategy,
            barebones=True,
            use_distributed_sampler=False,
            **options,
        )
    except (ValueError, MisconfigurationException) as error:
        raise UserError(f"params.yaml: hardware: {' '.join(str(error).split())}") from None


def is_sharding(trainer: Any) -> bool:
    """Whether a Lightning `Trainer` cuts weights among its devices (`hardware.strategy: fsdp`)."""
    from lightning.pytorch.strategies import ModelParallelStrategy

    return isinstance(trainer.strategy, ModelParallelStrategy)
