"""SAEs in training as a LightningModule and their activations as a LightningDataModule, which any Trainer can fit."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from babelscope.activations.batches import Pair, Source
from babelscope.activations.moments import Normalisation
from babelscope.config.schema import Train
from babelscope.core.errors import UserError
from babelscope.sae.training import sharding
from babelscope.sae.training.graph import Graph
from babelscope.sae.training.learner import Learner
from babelscope.sae.training.schedule import BETAS, learning_rate, lr_multiplier
from babelscope.sae.training.step import Step
from babelscope.sae.training.trainer import is_dividing, is_sharding, pl

History = list[dict[str, float]]


class Activations(pl.LightningDataModule):  # type: ignore[misc]
    """The batches of a `Source`; the state is the number of the next batch, which alone determines that batch.

    The module is its own loader, since Lightning resumes from loaders that have a state.
    """

    def __init__(self, source: Source) -> None:
        super().__init__()
        self.source, self.first = source, 0

    def train_dataloader(self) -> "Activations":
        """Return the loader of this device's share of the batches."""
        return self

    def __len__(self) -> int:
        return self.source.steps

    def __iter__(self) -> Iterator[list[Pair]]:
        if self.source.processes > 1:
            return self.source.read(self.first)
        return self.source.read(self.first, self.trainer.global_rank, self.trainer.world_size)

    def state_dict(self) -> dict[str, int]:
        """Return the number of the next batch."""
        return {"batch": self.trainer.global_step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Begin with the batch of this number."""
        self.first = state["batch"]


class SAETraining(pl.LightningModule):  # type: ignore[misc]
    """SAEs in training on the same tokens, one per hookpoint; of several processes, each may train other ones.

    The learners are built when training starts, since their initialisation needs the moments of the activations, or
    when a checkpoint is loaded (`load_from_checkpoint`).

    Parameters
    ----------
    settings: the `train` section, or its content.
    steps: number of steps in the run, on which the learning rate depends.
    seed: seed of the initialisation.

    Attributes
    ----------
    histories: for every SAE, one row per logged step: `step`, `tokens`, `loss`, `fvu`, `l0`, `dead_share` and
        `learning_rate`. The Trainer's loggers get the same metrics; with several SAEs, `<number>/` precedes the names.
    """

    def __init__(self, settings: Train | Mapping[str, Any], *, steps: int, seed: int) -> None:
        super().__init__()
        self.automatic_optimization = False  # manual optimisation has a third less overhead
        self.settings = settings if isinstance(settings, Train) else Train(**settings)
        self.steps, self.seed = steps, seed
        self.save_hyperparameters({"settings": self.settings.model_dump(), "steps": steps, "seed": seed})
        self.rate = self.settings.learning_rate or learning_rate(self.settings.latents, steps)
        self.learners = nn.ModuleDict()  # by the numbers of their hookpoints
        self.histories: list[History] = []
        self._normalisations: dict[int, tuple[Normalisation, Normalisation | None]] = {}
        self._graphs: list[Graph] = []
        self._sharded = False

    @property
    def each(self) -> list[Learner]:
        """The learners, in the order of the hookpoints."""
        return [learner for learner in self.learners.values() if isinstance(learner, Learner)]

    @property
    def sharing(self) -> int:
        """The number of devices that share every batch."""
        return 1 if is_dividing(self.trainer) else int(self.trainer.world_size)

    def build(self, normalisations: Mapping[int, tuple[Normalisation, Normalisation | None]]) -> None:
        """Make a learner for each pair of normalisations, those of its target and (transcoders) of its input.

        `normalisations`: by the number of the hookpoint.
        """
        self._normalisations = dict(normalisations)
        for number, pair in normalisations.items():
            self.learners[str(number)] = Learner(self.settings, *pair, steps=self.steps, seed=self.seed)
        self.histories = [[] for _ in normalisations]

    def setup(self, stage: str) -> None:
        """Make the learners from the moments of the data module's activations."""
        if self.learners:
            return
        if not isinstance(self.trainer.datamodule, Activations):
            raise UserError("SAETraining: no activations; call Trainer.fit with datamodule=Activations(source)")
        source = self.trainer.datamodule.source
        first = self.trainer.global_rank if source.processes > 1 else 0
        self.build(
            {
                first + place * source.processes: (target.normalisation(), encoded and encoded.normalisation())
                for place, (target, encoded) in enumerate(source.moments())
            }
        )

    def configure_model(self) -> None:
        """Shard the weights over the devices under FSDP."""
        if self._trainer is not None and is_sharding(self._trainer) and not self._sharded:
            self._sharded = True
            for learner in self.each:
                sharding.shard(learner, "loss", self.device_mesh["data_parallel"])

    def configure_optimizers(self) -> dict[str, Any]:
        """Fused AdamW, and its learning rate schedule.

        Only encoder rows decay. Adam moves a weight without a gradient signal, too, so that an encoder row collects
        random components in directions in which the activations hardly vary; decay removes these (arXiv 2603.04198).
        """
        weights = dict(self.named_parameters())
        encoders = [weights.pop(name) for name in list(weights) if name.endswith("sae.encoder")]
        shrinking = 0.0 if self.settings.frozen == "encoder" else self.settings.weight_decay
        groups: list[dict[str, Any]] = [
            {"params": encoders, "weight_decay": shrinking},
            {"params": list(weights.values())},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.rate, betas=BETAS, weight_decay=0.0, fused=True)
        warmup, decay = self.settings.warmup, self.settings.decay
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: lr_multiplier(step, self.steps, warmup, decay)
        )  # fmt: skip
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the histories and the normalisations of the learners, in plain types (for `weights_only`)."""
        checkpoint["histories"] = dict(zip(self._normalisations, self.histories, strict=True))
        checkpoint["normalisations"] = {
            number: [part and tuple(part) for part in pair] for number, pair in self._normalisations.items()
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load the histories; build the learners if there are none."""
        if not self.learners:
            saved = checkpoint["normalisations"].items()
            self.build(
                {n: (Normalisation(*target), source and Normalisation(*source)) for n, (target, source) in saved}
            )
        self.histories = [checkpoint["histories"][number] for number in self._normalisations]

    def training_step(self, batch: list[Pair], batch_idx: int) -> None:
        """One step of manual optimisation."""
        optimizer, world = self.optimizers(), self.sharing
        rate = optimizer.param_groups[0]["lr"]
        optimizer.zero_grad()
        results = self._replayed(batch)
        if results is None:
            results = [learner.loss(*pair, world=world) for learner, pair in zip(self.each, batch, strict=True)]
            self.manual_backward(torch.stack([result.loss for result in results]).sum())
        # `decoder.update_` needs float32 weights, gradients that are not scaled, and a batch that is not shared.
        alone = not self._sharded and world == 1 and self.trainer.precision == "32-true"
        for learner in self.each:
            learner.before_update(world, optimizer if alone else None)
        optimizer.step()
        self.lr_schedulers().step()
        done = self.global_step
        for learner, result in zip(self.each, results, strict=True):
            learner.after_update(self._mean(result), done / self.steps)
        if done % self.settings.log_every == 0 or done == self.steps:
            targets = [pair.x if pair.y is None else pair.y for pair in batch]
            figures = zip(self.each, targets, results, strict=True)
            self.record(done, rate, [learner.figures(target, result) for learner, target, result in figures])

    def _replayed(self, batch: list[Pair]) -> list[Step] | None:
        """Compute losses and gradients by CUDA graphs; None if there are several devices or graphs do not suit."""
        if self._sharded or self.sharing > 1 or not all(map(Graph.suits, self.each, (pair.x for pair in batch))):
            return None
        if not self._graphs:
            self._graphs = [Graph(learner, pair.x, pair.y) for learner, pair in zip(self.each, batch, strict=True)]
        if not all(graph.fits(pair.x) for graph, pair in zip(self._graphs, batch, strict=True)):
            return None
        results = []
        for learner, graph, pair in zip(self.each, self._graphs, batch, strict=True):
            normal, result = graph(pair.x, pair.y)
            learner.remember(normal, result, 1)
            results.append(result)
        return results

    def _mean(self, result: Step) -> Step:
        """`result` with the scalars that later steps depend on averaged over the devices."""
        if self.sharing == 1 or self.settings.activation == "topk":
            return result
        scalars = torch.stack([result.l0, result.min_activation])
        l0, min_activation = self.trainer.strategy.reduce(scalars, reduce_op="mean")
        return result._replace(l0=l0, min_activation=min_activation)

    def record(self, step: int, rate: float, figures: list[Tensor]) -> None:
        """Add a row to every history and pass it to the loggers; `figures` are the results of `Learner.figures`."""
        metrics: dict[str, float] = {}
        for number, sums in enumerate(figures):
            if self.sharing > 1:
                sums = self.trainer.strategy.reduce(sums, reduce_op="mean")
            loss, error, variance, l0, dead = sums.tolist()
            fvu = error / variance if variance else math.nan
            row = {"tokens": step * self.settings.batch, "loss": loss, "fvu": fvu, "l0": l0, "dead_share": dead}
            row["learning_rate"] = rate
            self.histories[number].append({"step": step, **row})
            prefix = f"{number}/" if len(figures) > 1 else ""
            metrics |= {prefix + name: value for name, value in row.items()}
        for logger in self.loggers:
            logger.log_metrics(metrics, step)
