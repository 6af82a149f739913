"""Shared by the stages `train` and `retrain`: the stored activations of a hookpoint, and the finished SAE's files."""

from importlib import import_module
from pathlib import Path
from threading import Thread

import polars as pl

from babelscope.activations.batches import Batches
from babelscope.activations.store import ActivationStore
from babelscope.config import Config
from babelscope.core.errors import UserError
from babelscope.core.files import read_table, write_atomically
from babelscope.core.paths import Paths
from babelscope.models import hardware
from babelscope.models.names import input_name
from babelscope.models.tokens import codes
from babelscope.sae import SAE, checkpoint
from babelscope.sae.metrics import quality


class StoredActivations:
    """The stored activations of a hookpoint, with the rows for training and for evaluation.

    Raises
    ------
    UserError: a file is missing or damaged, the token table does not match the store, or a split has no rows.
    """

    def __init__(self, params: Config, paths: Paths, hookpoint: str) -> None:
        self.train, self.hookpoint = params.train, hookpoint
        self.device = hardware.prepare(params.hardware)
        self.files = paths.activations / hookpoint, paths.tokens
        self.store, table = ActivationStore(self.files[0]), read_table(paths.tokens)
        encoded = input_name(hookpoint, self.train.transcode)
        self.inputs = ActivationStore(paths.activations / encoded) if self.train.transcode else None
        if len(table) != self.store.rows:
            raise UserError(
                f"{paths.tokens}: {len(table)} rows, but {self.files[0]} holds {self.store.rows}; run dvc repro extract"
            )
        self.train_rows, self.eval_rows = (table.filter(split=split) for split in ("train", "eval"))
        if self.train_rows.is_empty() or self.eval_rows.is_empty():
            raise UserError(f"{paths.tokens}: needs rows of the splits 'train' and 'eval'; run dvc repro sample")

    def batches(self, seed: int) -> Batches:
        """The batches for training; a thread imports Lightning while their moments are computed."""
        rows, steps = self.train_rows["row"].to_torch(), -(-self.train.tokens // self.train.batch)
        pin = self.device.type == "cuda"
        batches = Batches(self.store, rows, self.train.batch, steps, seed, self.inputs, pin=pin)
        importing = Thread(target=import_module, args=("babelscope.sae.training.loop",))
        importing.start()
        batches.moments()
        importing.join()
        return batches

    def save(self, sae: SAE, history: list[dict[str, float]], folder: Path) -> None:
        """Write a finished SAE with its history."""
        checkpoint.save(sae, folder, {"model_name": self.store.index["model"], "hook_name": self.hookpoint})
        write_atomically(folder / "history.csv", pl.DataFrame(history).write_csv)

    def figures(self, sae: SAE) -> dict[str, float]:
        """FVU, L0 and share of dead latents on the held-out rows, in all and per language."""
        languages = self.eval_rows["language"].unique().sort().to_list()
        code, rows = codes(self.eval_rows["language"], languages), self.eval_rows["row"].to_torch()
        return quality(sae.to(self.device), self.store, rows, code, len(languages), self.inputs).figures(languages)
