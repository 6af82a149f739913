"""The `hardware` section: the device for work on one device, CPU threads and memory."""

import ctypes
import sys

import torch

from babelscope.config.schema import Hardware
from babelscope.core.errors import UserError

# Of glibc's malloc.h: blocks below 32 MiB come from the heap, which keeps 256 MiB. With glibc's own values, training
# took up to half as much memory again, and `ablate` a quarter.
_MALLOPT = {-3: 2**25, -1: 2**28}  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD


def prepare(hardware: Hardware) -> torch.device:
    """Set the number of CPU threads and how memory is kept, and return the device.

    `auto` takes a CUDA device if there is one, else the CPU; `mps` must be named, since PyTorch lacks float64 there.

    Raises
    ------
    UserError: the accelerator that the section names is not there.
    """
    keep_freed_memory()
    if hardware.threads:
        torch.set_num_threads(hardware.threads)
    there = {"gpu": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    wanted = hardware.accelerator if hardware.accelerator != "auto" else "gpu" if there["gpu"] else "cpu"
    if not there[wanted]:
        allowed = ", ".join(["auto", *(name for name, found in there.items() if found)])
        raise UserError(f"params.yaml: hardware.accelerator: no {wanted!r} here; allowed: {allowed}")
    if wanted != "gpu":
        return torch.device(wanted)
    return torch.device("cuda", hardware.devices[0]) if isinstance(hardware.devices, list) else torch.device("cuda")


def device_count(hardware: Hardware) -> int:
    """How many devices of each node the section names."""
    if isinstance(hardware.devices, int | list):
        return hardware.devices if isinstance(hardware.devices, int) else len(hardware.devices)
    return torch.cuda.device_count() if prepare(hardware).type == "cuda" else 1


def keep_freed_memory() -> None:
    """Let this process keep memory that it frees; does nothing if the C library is not glibc.

    glibc hands large blocks back to the system as soon as they are free, and every training step asks for the same ones
    again: 1,400 page faults a step, a twentieth of its time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for parameter, value in _MALLOPT.items():
            mallopt(parameter, value)
