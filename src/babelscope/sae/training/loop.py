"""Training SAEs with Lightning's Trainer: checkpoints to resume from, progress, loggers."""

import logging
import pickle
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from babelscope.activations.batches import Source
from babelscope.config.schema import Hardware, Train
from babelscope.core.errors import UserError
from babelscope.core.files import write_atomically
from babelscope.core.progress import Progress
from babelscope.sae.autoencoder import SAE
from babelscope.sae.training.module import Activations, History, SAETraining
from babelscope.sae.training.trainer import is_sharding, pl, trainer

log = logging.getLogger(__name__)

Write = Callable[[int, Mapping[str, float]], None]

# At least this many times what the last checkpoint took to write passes before the next: 2 % of the time at most.
_APART = 50


class WriteLogger(pl.loggers.Logger):  # type: ignore[misc]
    """A Lightning logger that passes the metrics on, e.g. to the live MLflow run (`tracking.training`)."""

    name, version = "babelscope", ""

    def __init__(self, write: Write) -> None:
        super().__init__()
        self.write = write

    @pl.utilities.rank_zero_only  # type: ignore[untyped-decorator]
    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Pass on the metrics of a step."""
        self.write(step, metrics)

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Nothing: the run has the whole params."""


class ProgressLines(pl.Callback):  # type: ignore[misc]
    """The bar or the lines of `core.progress` in place of Lightning's bar."""

    def __init__(self, label: str, batch: int) -> None:
        self.label, self.batch = label, batch
        self.progress: Progress | None = None

    def on_train_start(self, trainer: Any, module: Any) -> None:
        """Begin with what earlier runs have done."""
        if trainer.is_global_zero:
            self.progress = Progress(self.label, trainer.num_training_batches * self.batch, "tokens")
            self.progress.skip(trainer.global_step * self.batch)

    def on_train_batch_end(self, *_: Any) -> None:
        """Count the tokens of a step."""
        if self.progress is not None:
            self.progress.update(self.batch)

    def on_train_end(self, *_: Any) -> None:
        """Close with the time that it took."""
        if self.progress is not None:
            self.progress.__exit__(None, None, None)

    def on_exception(self, trainer: Any, module: Any, error: BaseException) -> None:
        """Close without a word."""
        if self.progress is not None:
            self.progress.__exit__(type(error), error, None)


class TimedCheckpoint(pl.callbacks.ModelCheckpoint):  # type: ignore[misc]
    """`folder/last.ckpt` every so many seconds, at most 2 % of the time.

    Lightning 2.6 ignores its own `train_time_interval` under manual optimisation.
    """

    def __init__(self, folder: Path, seconds: float, every_steps: int) -> None:
        super().__init__(dirpath=folder, save_last=True, save_top_k=0)
        self.path, self.seconds, self.every_steps, self.due = folder / "last.ckpt", seconds, every_steps, 0.0

    def on_train_start(self, *_: Any) -> None:
        """Start the clock."""
        self.due = time.monotonic() + self.seconds

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        """Save if it is time, but for the last step."""
        is_due = time.monotonic() >= self.due
        if trainer.world_size > 1:
            # All devices take part, by the clock of the first; asking it costs too much to do so at every step.
            is_due = trainer.global_step % self.every_steps == 0 and trainer.strategy.broadcast(is_due)
        if not is_due or trainer.is_last_batch:
            return
        start = time.monotonic()
        trainer.save_checkpoint(self.path)
        end = time.monotonic()
        self.due = end + max(self.seconds, _APART * (end - start))

    def on_train_end(self, *_: Any) -> None:
        """Nothing: the finished SAE takes the place of a checkpoint."""


class AtomicCheckpointIO(pl.plugins.TorchCheckpointIO):  # type: ignore[misc]
    """Checkpoints that are whole or not there; a full disk is an error that a user can read."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write the file."""
        write_atomically(Path(path), lambda temporary: torch.save(checkpoint, temporary))


def resumable(path: Path, training: SAETraining) -> Path | None:
    """The checkpoint if training can resume from it; None if there is none, or it is damaged.

    Raises
    ------
    UserError: it is of another run.
    """
    if not path.exists():
        return None
    try:
        state = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    except (RuntimeError, ValueError, OSError, EOFError, pickle.UnpicklingError):
        log.warning("%s: damaged; the training starts anew", path)
        return None
    if not isinstance(state, dict) or state.get(training.CHECKPOINT_HYPER_PARAMS_KEY) != dict(training.hparams):
        raise UserError(f"{path}: not a checkpoint of this run, delete it")
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
    folder: where checkpoints to resume from are written; the caller deletes it once its outputs are written.
    write: called as `write(step, metrics)` at every logged step, on the first rank.
    label: of the progress.

    Returns
    -------
    For every hookpoint the SAE in the units of the activations, and its history (see `SAETraining`); None on the other
    ranks of a distributed run.

    Raises
    ------
    UserError: the batch does not divide among the devices, the checkpoint is of another run, or the training diverged.
    """
    training = SAETraining(settings, steps=source.steps, seed=seed)
    loop = trainer(
        hardware,
        max_epochs=1,
        logger=False if write is None else WriteLogger(write),
        log_every_n_steps=min(settings.log_every, source.steps),
        enable_checkpointing=True,
        callbacks=[
            TimedCheckpoint(folder, hardware.checkpoint_seconds, settings.log_every),
            ProgressLines(label, settings.batch),
        ],
        plugins=[AtomicCheckpointIO()],
    )
    if settings.batch % loop.world_size:
        raise UserError(f"params.yaml: train.batch: {settings.batch} does not divide among {loop.world_size} devices")
    checkpoint = resumable(folder / "last.ckpt", training)
    loop.fit(training, datamodule=Activations(source), ckpt_path=checkpoint, weights_only=True)
    if not (loop.is_global_zero or is_sharding(loop)):
        return None
    # Gradients and moments go before the finished weights are made: memory for both would be needed at once.
    training.zero_grad(set_to_none=True)
    for optimizer in loop.strategy.optimizers:
        optimizer.state.clear()
    finished = [(learner.finished(), rows) for learner, rows in zip(training.each, training.histories, strict=True)]
    if not all(bool(weight.isfinite().all()) for sae, _ in finished for weight in sae.parameters()):
        raise UserError("params.yaml: train.learning_rate: the training diverged; lower it")
    return finished if loop.is_global_zero else None


def is_first_process() -> bool:
    """Whether this process is rank 0 of a distributed run, or the only one; known before training starts."""
    return not pl.utilities.rank_zero_only.rank
