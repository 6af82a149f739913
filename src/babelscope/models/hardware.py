"""The `hardware` section: the device, CPU threads and memory."""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from babelscope.config.schema import Hardware
from babelscope.core.errors import UserError

# Options of glibc's malloc.h: blocks below 32 MiB come from the heap, which keeps up to 256 MiB of freed memory. With
# glibc's defaults, training took up to 50 % more memory, and `ablate` 25 %.
_MALLOPT = {-3: 2**25, -1: 2**28}  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD


def prepare(hardware: Hardware) -> torch.device:
    """Set the number of CPU threads and malloc's options, and return the device.

    `auto` takes a CUDA device if there is one, else the CPU. It never takes `mps`, which has no float64.

    Raises
    ------
    UserError: the accelerator of the section is not available.
    """
    keep_freed_memory()
    if hardware.threads:
        torch.set_num_threads(hardware.threads)
    available = {"gpu": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    wanted = hardware.accelerator if hardware.accelerator != "auto" else "gpu" if available["gpu"] else "cpu"
    if not available[wanted]:
        allowed = ", ".join(["auto", *(name for name, found in available.items() if found)])
        raise UserError(f"params.yaml: hardware.accelerator: no {wanted!r} here; allowed: {allowed}")
    if wanted != "gpu":
        return torch.device(wanted)
    return torch.device("cuda", hardware.devices[0]) if isinstance(hardware.devices, list) else torch.device("cuda")


def prepare_own(hardware: Hardware) -> torch.device:
    """Like `prepare`; if the node has several CUDA devices, return the one of this process and make it the default.

    The process is one that Lightning or SLURM's `srun` has started.
    """
    device = prepare(hardware)
    if device.type == "cuda" and device_count(hardware) > 1:
        number = int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)
        device = torch.device("cuda", hardware.devices[number] if isinstance(hardware.devices, list) else number)
        torch.cuda.set_device(device)
    return device


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one CPU thread, where the number of threads would change how results are rounded."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def device_count(hardware: Hardware) -> int:
    """The number of devices per node in the section."""
    if isinstance(hardware.devices, int | list):
        return hardware.devices if isinstance(hardware.devices, int) else len(hardware.devices)
    return torch.cuda.device_count() if prepare(hardware).type == "cuda" else 1


def divides(hardware: Hardware, hookpoints: int) -> int:
    """The number of processes that train different SAEs in stage `stream`; 1 if all train the same ones.

    SAE number i is trained by process i % n: nothing has to be sent but activations, and the bits are those of one
    device. `ddp` and `fsdp`, and fewer hookpoints than devices, divide the rows of a batch or the weights instead.
    """
    processes = device_count(hardware) * hardware.num_nodes
    return processes if hardware.strategy == "auto" and processes <= hookpoints else 1


def keep_freed_memory() -> None:
    """Let this process keep memory that it frees; does nothing if the C library is not glibc.

    By default, glibc returns large blocks to the system when they are freed, and every training step asks for the same
    blocks again. This causes 1,400 page faults per step, which take 5 % of its time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for parameter, value in _MALLOPT.items():
            mallopt(parameter, value)
