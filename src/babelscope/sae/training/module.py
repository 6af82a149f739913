"""Training SAEs: the LightningModule around the fast step, and the run with its checkpoints to resume from."""

import logging
import math
import pickle
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from babelscope.activations.batches import Pair, Source
from babelscope.config.schema import Hardware, Train
from babelscope.core.errors import UserError
from babelscope.core.files import write_atomically
from babelscope.models.hardware import is_sharding, trainer
from babelscope.sae.autoencoder import SAE
from babelscope.sae.training import sharding
from babelscope.sae.training.graph import Graph
from babelscope.sae.training.learner import Learner
from babelscope.sae.training.schedule import BETAS, learning_rate, rate_share
from babelscope.sae.training.step import Step

log = logging.getLogger(__name__)

Write = Callable[[int, Mapping[str, float]], None]
History = list[dict[str, float]]

# Between two checkpoints lies at least so many times what the last one took to write: 2 % of the time at most.
_APART = 50


class SAETraining(LightningModule):  # type: ignore[misc]
    """SAEs in training on the same tokens, one per hookpoint.

    Parameters
    ----------
    batches: the training data.
    settings: the `train` section.
    seed: of the initialisation.
    write: one per hookpoint; called as `write(step, metrics)` every `log_every` steps and at the last, on rank 0.
    checkpoint: file of the state to resume from, written every `checkpoint_seconds`.
    """

    def __init__(
        self,
        batches: Source,
        settings: Train,
        *,
        seed: int,
        write: Sequence[Write],
        checkpoint: Path,
        checkpoint_seconds: float,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False  # one optimizer, no closures: a third of the overhead
        self.batches, self.settings, self.write, self.checkpoint = batches, settings, write, checkpoint
        self.learners = nn.ModuleList(
            Learner(settings, *moments, steps=batches.steps, seed=seed) for moments in batches.moments()
        )
        self.rate = settings.learning_rate or learning_rate(settings.latents, batches.steps)
        self.done = 0
        self.histories: list[History] = [[] for _ in self.learners]
        self._moments: dict[str, Any] | None = None
        self._graphs: list[Graph] = []
        self._sharded = False
        self.checkpoint_seconds = checkpoint_seconds
        self._due = time.monotonic() + checkpoint_seconds
        if checkpoint.exists():
            self._load()

    @property
    def each(self) -> list[Learner]:
        """The learners, in the order of the hookpoints."""
        return [learner for learner in self.learners if isinstance(learner, Learner)]

    def configure_model(self) -> None:
        """Under FSDP cut the weights among the devices."""
        self._sharded = is_sharding(self.trainer)
        if self._sharded:
            for learner in self.each:
                sharding.shard(learner, "loss", self.device_mesh["data_parallel"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Fused Adam over all weights."""
        optimizer = torch.optim.Adam(self.parameters(), lr=self.rate, betas=BETAS, fused=True)
        if self._moments is not None:
            optimizer.load_state_dict(self._moments)
            sharding.cut_moments(optimizer)
            self._moments = None
        return optimizer

    def train_dataloader(self) -> Iterator[list[Pair]]:
        """Return this rank's share of the batches that are still to come."""
        return self.batches.read(self.done, self.trainer.global_rank, self.trainer.world_size)

    def training_step(self, batch: list[Pair], batch_idx: int) -> None:
        """One step of manual optimisation."""
        optimizer = self.optimizers()
        optimizer.zero_grad()
        rate = self.rate * rate_share(self.done, self.batches.steps, self.settings.warmup, self.settings.decay)
        optimizer.param_groups[0]["lr"] = rate
        world = self.trainer.world_size
        results = self._replayed(batch)
        if results is None:
            results = [learner.loss(x, y, world) for learner, (x, y) in zip(self.each, batch, strict=True)]
            self.manual_backward(torch.stack([result.loss for result in results]).sum())
        for learner in self.each:
            learner.before_update(world)
        optimizer.step()
        self.done += 1
        for learner, result in zip(self.each, results, strict=True):
            learner.after_update(self._mean(result), self.done / self.batches.steps)
        if self.done % self.settings.log_every == 0 or self.done == self.batches.steps:
            for number, ((x, y), result) in enumerate(zip(batch, results, strict=True)):
                self._record(number, self.each[number].figures(x if y is None else y, result), rate)
        if self._is_due() and self.done < self.batches.steps:
            self._save()

    def _replayed(self, batch: list[Pair]) -> list[Step] | None:
        """Losses and gradients by CUDA graphs, where there is one device that has them; null elsewhere."""
        if self._sharded or self.trainer.world_size > 1 or not all(map(Graph.suits, self.each, (x for x, _ in batch))):
            return None
        if not self._graphs:
            self._graphs = [Graph(learner, x, y) for learner, (x, y) in zip(self.each, batch, strict=True)]
        if not all(graph.fits(x) for graph, (x, _) in zip(self._graphs, batch, strict=True)):
            return None
        results = []
        for learner, graph, (x, y) in zip(self.each, self._graphs, batch, strict=True):
            normal, result = graph(x, y)
            learner.remember(normal, result, 1)
            results.append(result)
        return results

    def _mean(self, result: Step) -> Step:
        """The scalars that steer later steps, averaged over the devices."""
        if self.trainer.world_size == 1 or self.settings.activation == "topk":
            return result
        l0, lowest = self.trainer.strategy.reduce(torch.stack([result.l0, result.lowest]), reduce_op="mean")
        return result._replace(l0=l0, lowest=lowest)

    def _record(self, number: int, sums: Tensor, rate: float) -> None:
        if self.trainer.world_size > 1:
            sums = self.trainer.strategy.reduce(sums, reduce_op="mean")
        loss, error, variance, l0, dead = sums.tolist()
        # A batch in which all activations are the training mean has no variance to explain.
        fvu = error / variance if variance else math.nan
        metrics = {"loss": loss, "fvu": fvu, "l0": l0, "dead_share": dead, "learning_rate": rate}
        row: dict[str, float] = {"tokens": self.done * self.batches.size, **metrics}
        self.histories[number].append({"step": self.done, **row})
        if self.trainer.is_global_zero:
            self.write[number](self.done, row)

    def _is_due(self) -> bool:
        due = time.monotonic() >= self._due
        if not self._sharded:
            return due
        # All devices take part, and by the clock of one; not at every step, for it is waited for.
        return self.done % self.settings.log_every == 0 and bool(self.trainer.strategy.broadcast(due))

    def _save(self) -> None:
        if not (self._sharded or self.trainer.is_global_zero):
            return
        start = time.monotonic()
        state = {
            "done": self.done,
            "histories": self.histories,
            "module": self.state_dict(),
            "optimizer": self.optimizers().optimizer.state_dict(),
        }
        if self._sharded:
            state = tree_map_only(Tensor, lambda tensor: sharding.whole(tensor).cpu(), state)
        if self.trainer.is_global_zero:
            write_atomically(self.checkpoint, lambda path: torch.save(state, path))
        end = time.monotonic()
        self._due = end + max(self.checkpoint_seconds, _APART * (end - start))

    def _load(self) -> None:
        try:
            state = torch.load(self.checkpoint, weights_only=True, map_location="cpu")
        except (RuntimeError, ValueError, OSError, EOFError, pickle.UnpicklingError):
            log.warning("%s: damaged; the training starts anew", self.checkpoint)
            return
        try:
            self.load_state_dict(state["module"])
            self.done, self.histories, self._moments = state["done"], state["histories"], state["optimizer"]
        except (RuntimeError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise UserError(f"{self.checkpoint}: not a checkpoint of this run, delete it: {error}") from None
        log.info("resumed at step %d of %d", self.done, self.batches.steps)


def is_first_process() -> bool:
    """Whether this process is rank 0 of a distributed run, or the only one; known before training starts."""
    return not rank_zero_only.rank


def train(
    batches: Source, settings: Train, hardware: Hardware, *, seed: int, write: Sequence[Write], checkpoint: Path
) -> list[tuple[SAE, History]] | None:
    """Train one SAE per hookpoint of `batches` to the end, from `checkpoint` if that file exists.

    Parameters
    ----------
    batches: the training data.
    settings, hardware: sections of params.yaml; what `hardware` says changes no batch.
    seed: of the initialisation.
    write: one per hookpoint; called as `write(step, metrics)` at every logged step, on the first rank.
    checkpoint: file of the state to resume from; left behind, for the caller to delete when its outputs are written.

    Returns
    -------
    For every hookpoint the SAE in the units of the activations, and one row per logged step (`step`, `tokens`, `loss`,
    `fvu`, `l0`, `dead_share`, `learning_rate`); None on the other ranks of a distributed run.

    Raises
    ------
    UserError: the batch does not divide among the devices, `checkpoint` is of another run, or the training diverged.
    """
    devices = hardware.devices * hardware.num_nodes
    if settings.batch % devices:
        raise UserError(f"params.yaml: train.batch: {settings.batch} does not divide among {devices} devices")
    training = SAETraining(
        batches, settings,
        seed=seed, write=write, checkpoint=checkpoint, checkpoint_seconds=hardware.checkpoint_seconds,
    )  # fmt: skip
    loop = trainer(hardware, max_epochs=1)
    loop.fit(training)
    if not (loop.is_global_zero or is_sharding(loop)):
        return None
    # What only the steps need goes before the finished weights are made: they would come on top of it.
    training.zero_grad(set_to_none=True)
    for optimizer in loop.strategy.optimizers:
        optimizer.state.clear()
    finished = [(learner.finished(), rows) for learner, rows in zip(training.each, training.histories, strict=True)]
    if not all(bool(weight.isfinite().all()) for sae, _ in finished for weight in sae.parameters()):
        raise UserError("params.yaml: train.learning_rate: the training diverged; lower it")
    return finished if loop.is_global_zero else None
