"""Training SAEs with Lightning's Trainer: checkpoints, progress and loggers."""

import logging
import pickle
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from babelscope.activations.batches import Source
from babelscope.config.schema import Hardware, Train
from babelscope.core.errors import UserError
from babelscope.core.progress import Progress
from babelscope.models.hardware import prepare_own
from babelscope.models.processes import together
from babelscope.sae.autoencoder import SAE
from babelscope.sae.training.module import Activations, History, SAETraining
from babelscope.sae.training.parts import AtomicCheckpointIO, read_parts
from babelscope.sae.training.trainer import is_sharding, pl, trainer

log = logging.getLogger(__name__)

Write = Callable[[int, Mapping[str, float]], None]

# Minimum time between checkpoints as a multiple of the time to write one: writing takes at most 2 % of a run.
_APART = 50


class WriteLogger(pl.loggers.Logger):  # type: ignore[misc]
    """A Lightning logger that passes metrics to a function, e.g. to that of the live MLflow run."""

    name, version = "babelscope", ""

    def __init__(self, write: Write) -> None:
        super().__init__()
        self.write = write

    @pl.utilities.rank_zero_only  # type: ignore[untyped-decorator]
    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Pass the metrics of a step to `write`."""
        self.write(step, metrics)

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Do nothing: the MLflow run already has all params."""


class ProgressLines(pl.Callback):  # type: ignore[misc]
    """The progress bar or lines of `core.progress`, in place of Lightning's bar."""

    def __init__(self, label: str, batch: int) -> None:
        self.label, self.batch = label, batch
        self.progress: Progress | None = None

    def on_train_start(self, trainer: Any, module: Any) -> None:
        """Begin at the step of the checkpoint."""
        if trainer.is_global_zero:
            self.progress = Progress(self.label, trainer.num_training_batches * self.batch, "tokens")
            self.progress.skip(trainer.global_step * self.batch)

    def on_train_batch_end(self, *_: Any) -> None:
        """Count the tokens of a step."""
        if self.progress is not None:
            self.progress.update(self.batch)

    def on_train_end(self, *_: Any) -> None:
        """Close, and log the time that it took."""
        if self.progress is not None:
            self.progress.__exit__(None, None, None)

    def on_exception(self, trainer: Any, module: Any, error: BaseException) -> None:
        """Close without logging the time."""
        if self.progress is not None:
            self.progress.__exit__(type(error), error, None)


class TimedCheckpoint(pl.callbacks.ModelCheckpoint):  # type: ignore[misc]
    """Writes `folder/last.ckpt` every `seconds`, or less often if writing would take more than 2 % of the time.

    Lightning 2.6 ignores its own `train_time_interval` in manual optimisation. With several devices, the first decides
    every `every_steps` steps, since a decision takes communication.
    """

    def __init__(self, folder: Path, seconds: float, every_steps: int) -> None:
        super().__init__(dirpath=folder, save_last=True, save_top_k=0)
        self.path, self.seconds, self.every_steps, self.due = folder / "last.ckpt", seconds, every_steps, 0.0

    def on_train_start(self, *_: Any) -> None:
        """Start the clock."""
        self.due = time.monotonic() + self.seconds

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        """Save if it is time, except at the last step."""
        is_due = time.monotonic() >= self.due
        if trainer.world_size > 1:
            is_due = trainer.global_step % self.every_steps == 0 and trainer.strategy.broadcast(is_due)
        if not is_due or trainer.is_last_batch:
            return
        start = time.monotonic()
        trainer.save_checkpoint(self.path)
        end = time.monotonic()
        self.due = end + max(self.seconds, _APART * (end - start))

    def on_train_end(self, *_: Any) -> None:
        """Do nothing: the finished SAE replaces the checkpoint."""


def resumable(path: Path, training: SAETraining, strategy: str) -> Path | None:
    """The checkpoint if training can resume from it; None if it is missing or damaged.

    Raises
    ------
    UserError: the checkpoint is from another run, or cannot be read with this `hardware.strategy`.
    """
    if not path.exists():
        return None
    try:
        state, *others = read_parts(path)
    except (RuntimeError, ValueError, OSError, EOFError, pickle.UnpicklingError):
        log.warning("%s: damaged; training starts from step 0", path)
        return None
    if not isinstance(state, dict) or state.get(training.CHECKPOINT_HYPER_PARAMS_KEY) != dict(training.hparams):
        raise UserError(f"{path}: not a checkpoint of this run; delete it")
    if others and strategy == "fsdp":
        raise UserError(
            f"{path}: of hardware.strategy auto, which fsdp cannot read; set it to auto, or delete the file"
        )
    log.info("resumed at step %d of %d", state["global_step"], training.steps)
    return path


def train(
    source: Source,
    settings: Train,
    hardware: Hardware,
    *,
    seed: int,
    folder: Path,
    write: Write | None = None,
    label: str = "train",
) -> list[tuple[SAE, History]] | None:
    """Train one SAE per hookpoint of `source` to the end, from `folder/last.ckpt` if that file exists.

    Parameters
    ----------
    source: the training data.
    settings, hardware: sections of params.yaml; nothing in `hardware` changes a batch.
    seed: of the initialisation.
    folder: folder for the checkpoint; the caller deletes it once its outputs are written.
    write: called as `write(step, metrics)` at every logged step, on the first rank.
    label: label of the progress.

    Returns
    -------
    For every hookpoint, the SAE in the units of the activations and its history (see `SAETraining`). Of several
    processes, each returns those of its own hookpoints if they train different SAEs (`source.processes`); otherwise the
    first returns all, and the others None.

    Raises
    ------
    UserError: the batch does not divide among the devices, the checkpoint is from another run, or training diverged.
    """
    training = SAETraining(settings, steps=source.steps, seed=seed)
    divided, device = source.processes > 1, prepare_own(hardware)
    loop = trainer(
        hardware,
        divided,
        max_epochs=1,
        logger=False if write is None else WriteLogger(write),
        log_every_n_steps=min(settings.log_every, source.steps),
        enable_checkpointing=True,
        callbacks=[
            TimedCheckpoint(folder, hardware.checkpoint_seconds, settings.log_every),
            ProgressLines(label, settings.batch),
        ],
        plugins=[AtomicCheckpointIO(source.processes, device)],
    )
    if not divided and settings.batch % loop.world_size:
        raise UserError(f"params.yaml: train.batch: {settings.batch} does not divide among {loop.world_size} devices")
    checkpoint = resumable(folder / "last.ckpt", training, hardware.strategy)
    loop.fit(training, datamodule=Activations(source), ckpt_path=checkpoint, weights_only=True)
    if not (loop.is_global_zero or divided or is_sharding(loop)):
        return None
    # Free gradients and Adam's moments first, since the finished weights take additional memory.
    training.zero_grad(set_to_none=True)
    for optimizer in loop.strategy.optimizers:
        optimizer.state.clear()
    finished = [(learner.finished(), rows) for learner, rows in zip(training.each, training.histories, strict=True)]

    def check() -> None:
        if not all(bool(weight.isfinite().all()) for sae, _ in finished for weight in sae.parameters()):
            raise UserError("params.yaml: train.learning_rate: the training diverged; lower it")

    together(check, device) if divided else check()
    return finished if loop.is_global_zero or divided else None
