"""The import of Lightning, without packages that are not needed here, and a Trainer for the `hardware` section."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import PackageNotFoundError
from typing import Any
from unittest import mock

from babelscope.config.schema import Hardware
from babelscope.core.errors import UserError
from babelscope.models.hardware import device_count, prepare

# Other modules must import Lightning from here, since its first import decides which packages are loaded.
__all__ = ["is_dividing", "is_sharding", "pl", "trainer"]

# Optional packages of torchmetrics, which take more than half of the time of Lightning's import.
_UNUSED = ("matplotlib", "PIL", "scipy", "transformers")


@contextmanager
def _without(packages: tuple[str, ...]) -> Iterator[None]:
    """While open, `lightning_utilities` reports these packages as not installed; no effect if its API has changed."""
    try:
        imports = import_module("lightning_utilities.core.imports")
        find_spec, version = imports.find_spec, imports._version
    except (ImportError, AttributeError):
        yield
        return

    def no_spec(name: str, *rest: Any) -> Any:
        return None if name.partition(".")[0] in packages else find_spec(name, *rest)

    def no_version(name: str) -> str:
        if name in packages:
            raise PackageNotFoundError(name)
        return str(version(name))

    with mock.patch.multiple(imports, find_spec=no_spec, _version=no_version):
        yield


with _without(_UNUSED):
    import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy  # noqa: E402
from lightning.pytorch.utilities.exceptions import MisconfigurationException  # noqa: E402

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # the import sets it to INFO
# Lightning 2.6 itself calls this deprecated function of torch 2.13.
warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated")
# The calling thread reads on purpose (`activations.batches`).
warnings.filterwarnings("ignore", message=".*does not have many workers.*")


class _Divided(DDPStrategy):  # type: ignore[misc]
    """Processes that train different SAEs: they share no weight, so no gradient is sent, and each writes its part."""

    def configure_ddp(self) -> None:
        """Leave the module as it is."""

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Pass the part of every process to the plugin, not of the first only."""
        self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options)


def trainer(hardware: Hardware, divided: bool = False, **options: Any) -> pl.Trainer:
    """A Lightning `Trainer` for the `hardware` section; without further options it writes and prints nothing.

    Parameters
    ----------
    hardware: accelerator, devices, nodes and strategy.
    divided: whether the processes train different SAEs (see `models.hardware.divides`).
    options: further arguments of the `Trainer`.

    Raises
    ------
    UserError: the devices or the strategy of the section are not available.
    """
    accelerator = prepare(hardware).type
    strategy: Any = _Divided() if divided else hardware.strategy
    if strategy == "fsdp":  # Lightning's strategy of that name is the older FSDP, which does not run on CPUs
        strategy = ModelParallelStrategy(
            device_count(hardware) * hardware.num_nodes, 1, save_distributed_checkpoint=False
        )
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "use_distributed_sampler")
    try:
        return pl.Trainer(
            accelerator=accelerator,
            devices=hardware.devices,
            num_nodes=hardware.num_nodes,
            strategy=strategy,
            **(dict.fromkeys(quiet, False) | options),
        )
    except (TypeError, ValueError, MisconfigurationException) as error:
        raise UserError(f"params.yaml: hardware: {' '.join(str(error).split())}") from None


def is_sharding(trainer: pl.Trainer) -> bool:
    """Whether a Lightning `Trainer` shards weights over its devices (`hardware.strategy: fsdp`)."""
    return isinstance(trainer.strategy, ModelParallelStrategy)


def is_dividing(trainer: pl.Trainer) -> bool:
    """Whether the processes of a Lightning `Trainer` train different SAEs."""
    return isinstance(trainer.strategy, _Divided)
