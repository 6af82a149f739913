"""The `hardware` section: the device for work on one, and Lightning's trainer for work that may be distributed."""

import logging
import warnings
from typing import Any

import torch

from babelscope.config import Hardware
from babelscope.errors import UserError


def prepare(hardware: Hardware) -> torch.device:
    """Set the number of CPU threads and return the device: the accelerator where there is one, else the CPU.

    Raises
    ------
    UserError: the accelerator that is asked for is not there.
    """
    if hardware.threads:
        torch.set_num_threads(hardware.threads)
    there = {"gpu": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if hardware.accelerator == "auto":
        return torch.device("cuda" if there["gpu"] else "cpu")
    if not there[hardware.accelerator]:
        allowed = ", ".join(["auto", *(name for name, found in there.items() if found)])
        raise UserError(f"params.yaml: hardware.accelerator: no {hardware.accelerator!r} here; allowed: {allowed}")
    return torch.device("cuda" if hardware.accelerator == "gpu" else hardware.accelerator)


def trainer(hardware: Hardware, **options: Any) -> Any:
    """A Lightning `Trainer` for the section that writes, prints and shuffles nothing by itself.

    Parameters
    ----------
    hardware: accelerator, devices, nodes and strategy.
    options: further arguments of the `Trainer`.
    """
    from lightning.pytorch import Trainer

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # the import sets it to INFO
    # Lightning 2.6 under torch 2.13: its own call of a deprecated function.
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated")
    return Trainer(
        accelerator=hardware.accelerator, devices=hardware.devices, num_nodes=hardware.num_nodes,
        strategy=hardware.strategy, barebones=True, use_distributed_sampler=False, **options,
    )  # fmt: skip
