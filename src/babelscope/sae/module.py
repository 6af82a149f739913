"""Training an SAE: the LightningModule around the fast step, and the run with its checkpoints to resume from."""

import logging
import pickle
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from babelscope.config import Hardware, Train
from babelscope.errors import UserError
from babelscope.files import write_atomically
from babelscope.hardware import trainer
from babelscope.sae.autoencoder import SAE, initialise
from babelscope.sae.batches import Batches
from babelscope.sae.step import Step, sparse_step

log = logging.getLogger(__name__)

Write = Callable[[int, Mapping[str, float]], None]
# Rows of a step on which dead latents learn: enough for their direction, and a fraction of the step's time.
_AUX_ROWS = 256


def rate_share(step: int, steps: int, warmup: float, decay: float) -> float:
    """Share of the peak learning rate at `step` (0-based): linear warm-up, constant, linear decay.

    Parameters
    ----------
    step, steps: which of how many.
    warmup, decay: shares of the steps over which the rate rises from 0 and falls to 0 (neither end is 0 itself).
    """
    rise = (step + 1) / (warmup * steps) if warmup * steps >= 1 else 1.0
    fall = (steps - step) / (decay * steps) if decay * steps >= 1 else 1.0
    return min(1.0, rise, fall)


def auxiliary_loss(sae: SAE, x: Tensor, error: Tensor, dead: Tensor) -> Tensor:
    """Mean over rows of the squared error of explaining the residual with dead latents only (Gao et al. 2024, A.2).

    It is in the units of the main loss, as in the paper, whose coefficient is 1/32.

    Parameters
    ----------
    x: float32 [rows, d].
    error: [rows, d], x_hat - x of the step, taken as a constant.
    dead: int64 [m], the dead latents; at most d / 2 of them, the most active, take part in a row.
    """
    pre = (x - sae.b_dec.detach()) @ sae.encoder[dead].T + sae.b_enc[dead]
    values, place = pre.relu().topk(min(sae.d // 2, len(dead)), dim=-1, sorted=False)
    explained = torch.zeros_like(pre).scatter(1, place, values) @ sae.W_dec[dead]
    return (explained + error).square().sum() / len(x)


class SAETraining(LightningModule):  # type: ignore[misc]
    """One SAE in training, on activations scaled to a mean squared norm of d.

    Parameters
    ----------
    batches: the training data.
    settings: the `train` section.
    seed: of the initialisation.
    write: called as `write(step, metrics)` every `log_every` steps and at the last, on the first rank.
    checkpoint: file of the state to resume from, written every `checkpoint_every` steps.
    """

    def __init__(self, batches: Batches, settings: Train, *, seed: int, write: Write, checkpoint: Path) -> None:
        super().__init__()
        self.automatic_optimization = False  # one optimizer, no closures: a third of the overhead
        mean, norm = batches.moments()
        self.scale = (batches.store.d / norm) ** 0.5 if norm > 0 else 1.0
        self.mean = mean * self.scale
        self.sae = initialise(self.mean, settings.latents, settings.k, encoder_scale=settings.encoder_scale, seed=seed)
        self.batches, self.settings, self.write, self.checkpoint = batches, settings, write, checkpoint
        self.done = 0
        self.history: list[dict[str, float]] = []
        self.register_buffer("idle", torch.zeros(settings.latents, dtype=torch.int64))  # tokens since the last firing
        self._moments: dict[str, Any] | None = None
        if checkpoint.exists():
            self._load()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Fused Adam over the four weights."""
        optimizer = torch.optim.Adam(self.sae.parameters(), lr=self.settings.learning_rate, fused=True)
        if self._moments is not None:
            optimizer.load_state_dict(self._moments)
        return optimizer

    def train_dataloader(self) -> Iterator[Tensor]:
        """Return this rank's share of the batches that are still to come."""
        return self.batches.read(self.done, self.trainer.global_rank, self.trainer.world_size)

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        """One step of manual optimisation."""
        x = batch.float().mul_(self.scale)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        rate = self.settings.learning_rate * rate_share(
            self.done, self.batches.steps, self.settings.warmup, self.settings.decay
        )
        optimizer.param_groups[0]["lr"] = rate
        result = sparse_step(self.sae, x)
        self._track(result)
        self.manual_backward(self._loss(x, result))
        _project(self.sae)
        optimizer.step()
        _renormalise(self.sae)
        self.done += 1
        if self.done % self.settings.log_every == 0 or self.done == self.batches.steps:
            self._record(x, result, rate)
        if self.done % self.settings.checkpoint_every == 0 and self.done < self.batches.steps:
            self._save()

    def _track(self, result: Step) -> None:
        self.idle.add_(self.batches.size).masked_fill_(result.activity > 0, 0)
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(self.idle, torch.distributed.ReduceOp.MIN)

    def _loss(self, x: Tensor, result: Step) -> Tensor:
        if not self.settings.aux_k_coefficient:
            return result.loss
        dead = (self.idle > self.settings.dead_after).nonzero().squeeze(1)
        if not len(dead):
            return result.loss
        # A batch is in the order of the store, which is that of text lengths: take rows from all of it.
        few = slice(None, None, max(1, len(x) // _AUX_ROWS))
        return result.loss + self.settings.aux_k_coefficient * auxiliary_loss(self.sae, x[few], result.error[few], dead)

    def _record(self, x: Tensor, result: Step, rate: float) -> None:
        figures = torch.stack(
            [
                result.loss.detach(),
                result.error.square().sum() / (x - self.mean.to(x.device)).square().sum(),
                (result.values > 0).sum() / len(x),
                (self.idle > self.settings.dead_after).float().mean(),
            ]
        )
        if self.trainer.world_size > 1:
            figures = self.trainer.strategy.reduce(figures, reduce_op="mean")
        names = ("loss", "fvu", "l0", "dead_share")
        metrics = dict(zip(names, figures.tolist(), strict=True)) | {"learning_rate": rate}
        row: dict[str, float] = {"tokens": self.done * self.batches.size, **metrics}
        self.history.append({"step": self.done, **row})
        if self.trainer.is_global_zero:
            self.write(self.done, row)

    def _save(self) -> None:
        if not self.trainer.is_global_zero:
            return
        state = {
            "done": self.done,
            "history": self.history,
            "module": self.state_dict(),
            "optimizer": self.optimizers().optimizer.state_dict(),
        }
        write_atomically(self.checkpoint, lambda path: torch.save(state, path))

    def _load(self) -> None:
        try:
            state = torch.load(self.checkpoint, weights_only=True, map_location="cpu")
            self.load_state_dict(state["module"])
            self.done, self.history, self._moments = state["done"], state["history"], state["optimizer"]
        except (RuntimeError, KeyError, ValueError, OSError, pickle.UnpicklingError) as error:
            raise UserError(f"{self.checkpoint}: not a checkpoint of this run, delete it: {error}") from None
        log.info("resumed at step %d of %d", self.done, self.batches.steps)


@torch.no_grad()
def _project(sae: SAE) -> None:
    """Take off the decoder's gradient what would change its rows' norms."""
    gradient = sae.W_dec.grad
    assert gradient is not None
    gradient.addcmul_((gradient * sae.W_dec).sum(1, keepdim=True), sae.W_dec, value=-1)


@torch.no_grad()
def _renormalise(sae: SAE) -> None:
    sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))


def is_first_process() -> bool:
    """Whether this process is rank 0 of a distributed run, or the only one; known before training starts."""
    return not rank_zero_only.rank


def in_raw_units(sae: SAE, scale: float) -> SAE:
    """Fold the scaling of the inputs into the biases: the same SAE, for activations that are not scaled."""
    weights = sae.encoder.detach(), sae.W_dec.detach(), sae.b_enc.detach() / scale, sae.b_dec.detach() / scale
    return SAE(*weights, sae.k)


def train(
    batches: Batches, settings: Train, hardware: Hardware, *, seed: int, write: Write, checkpoint: Path
) -> tuple[SAE, list[dict[str, float]]] | None:
    """Train an SAE to the end, from `checkpoint` if that file exists.

    Parameters
    ----------
    batches: the training data.
    settings, hardware: sections of params.yaml; what `hardware` says changes no batch.
    seed: of the initialisation.
    write: called as `write(step, metrics)` at every logged step, on the first rank.
    checkpoint: file of the state to resume from; left behind, for the caller to delete when its outputs are written.

    Returns
    -------
    The SAE in the units of the stored activations, and one row per logged step (`step`, `tokens`, `loss`, `fvu`, `l0`,
    `dead_share`, `learning_rate`); None on the other ranks of a distributed run.

    Raises
    ------
    UserError: the batch does not divide among the devices, or `checkpoint` is unreadable.
    """
    devices = hardware.devices * hardware.num_nodes
    if settings.batch % devices:
        raise UserError(f"params.yaml: train.batch: {settings.batch} does not divide among {devices} devices")
    training = SAETraining(batches, settings, seed=seed, write=write, checkpoint=checkpoint)
    loop = trainer(hardware, max_epochs=1)
    loop.fit(training)
    return (in_raw_units(training.sae, training.scale), training.history) if loop.is_global_zero else None
