"""Extraction: one forward pass for all hookpoints, as a Lightning prediction loop that writes shard after shard."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from babelscope.activations import store
from babelscope.config.schema import Hardware
from babelscope.core.errors import UserError
from babelscope.core.progress import Progress
from babelscope.models.forward import collate, own_activations
from babelscope.models.hookpoints import shard_blocks
from babelscope.models.lightning import is_sharding, pl, trainer
from babelscope.models.loading import DTYPES
from babelscope.models.tokens import TokenizedText, batches

log = logging.getLogger(__name__)

# Rows of a shard: small enough that a killed run loses little, large enough that there are few files.
SHARD_ROWS = 16384


@dataclass(frozen=True)
class Shard:
    """Consecutive batches whose rows make one shard."""

    number: int
    batches: list[list[TokenizedText]]

    @property
    def rows(self) -> int:
        """Own tokens in the shard."""
        return sum(text.own for batch in self.batches for text in batch)


def plan(texts: Sequence[TokenizedText], batch_tokens: int, shard_rows: int = SHARD_ROWS) -> list[Shard]:
    """Cut texts (in `by_length` order) into batches, and the batches into shards of about `shard_rows` rows."""
    shards: list[Shard] = []
    current: list[list[TokenizedText]] = []
    for batch in batches(texts, batch_tokens):
        current.append(batch)
        if sum(text.own for b in current for text in b) >= shard_rows:
            shards.append(Shard(len(shards), current))
            current = []
    if current:
        shards.append(Shard(len(shards), current))
    return shards


def padding_share(shards: Sequence[Shard]) -> float:
    """Share of the computed positions that are padding."""
    real = padded = 0
    for shard in shards:
        for batch in shard.batches:
            real += sum(len(text.ids) for text in batch)
            padded += len(batch) * max(len(text.ids) for text in batch)
    return 1 - real / padded if padded else 0.0


def token_table(shards: Sequence[Shard], corpus: polars.DataFrame) -> polars.DataFrame:
    """The row order of every activation file: `row`, `text_id`, `language`, `split`, `position`, `token_id`.

    `position` counts a text's own tokens from 0. `corpus` has `text_id`, `language`, `split`.
    """
    texts = [text for shard in shards for batch in shard.batches for text in batch]
    own = [list(text.ids[text.special :]) for text in texts]
    table = polars.DataFrame(
        {"text_id": [text.text_id for text in texts], "token_id": own},
        schema={"text_id": polars.String, "token_id": polars.List(polars.Int32)},
    )
    return (
        table.join(corpus.select("text_id", "language", "split"), on="text_id", how="left", maintain_order="left")
        .with_columns(position=polars.int_ranges(0, polars.col("token_id").list.len(), dtype=polars.Int32))
        .explode("token_id", "position")
        .drop_nulls("token_id")
        .with_row_index("row")
        .select(polars.col("row").cast(polars.Int64), "text_id", "language", "split", "position", "token_id")
    )


class Extractor(pl.LightningModule):  # type: ignore[misc]
    """Reads the hookpoints of one batch: a prediction step returns `{hookpoint: [own tokens, d]}` in `dtype`."""

    def __init__(self, model: Any, hookpoints: Sequence[str], dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.hookpoints, self.store_dtype = model, list(hookpoints), dtype

    def configure_model(self) -> None:
        """Under FSDP cut the weights of the model's blocks among the devices."""
        if is_sharding(self.trainer):
            shard_blocks(self.model, self.device_mesh["data_parallel"])

    def predict_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """`batch` is (token ids, attention mask, own-token mask), each `[texts, longest]`."""
        rows = own_activations(self.model, self.hookpoints, batch, self.store_dtype)
        return {name: activations.cpu() for name, activations in rows.items()}


class ShardWriter(pl.Callback):  # type: ignore[misc]
    """Collects what the prediction steps return and writes a shard whenever one is full."""

    def __init__(self, shards: Sequence[Shard], folder: Path, progress: Progress, *, quantised: bool) -> None:
        self.folder, self.progress, self.quantised = folder, progress, quantised
        self.ends = [(shard, i == len(shard.batches) - 1) for shard in shards for i in range(len(shard.batches))]
        self.parts: dict[str, list[Tensor]] = {}

    def on_predict_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep the batch; write the shard that it completes."""
        if batch_idx >= len(self.ends):  # run for other devices' sake
            return
        shard, is_last = self.ends[batch_idx]
        for name, activations in outputs.items():
            self.parts.setdefault(name, []).append(activations)
        self.progress.update(len(next(iter(outputs.values()))))
        if is_last:
            for name, parts in self.parts.items():
                store.write_shard(
                    store.place(self.folder, name), shard.number, torch.cat(parts), quantised=self.quantised
                )
            self.parts = {}


def extract(
    model: Any, shards: Sequence[Shard], hookpoints: Sequence[str], folder: Path, dtype: str, hardware: Hardware
) -> bool:
    """Write `folder/<hookpoint>/shard-*.safetensors` for every shard that is not there yet (inputs: see `store.place`).

    On several devices or nodes each takes whole shards: which batches make a shard depends on nothing but the texts, so
    that the bytes are those that one device writes. Under FSDP they pass each other the weights of a block when its
    turn comes, and one that has no batches left runs on for the others.

    Parameters
    ----------
    model: a causal language model.
    shards: the plan of the whole run; each rank of a distributed run takes every n-th.
    hookpoints: what to read, see `babelscope.models.forward.names_to_read`.
    folder: where the shards go; shards that an interrupted run left there are kept. Several nodes must share it.
    dtype: dtype of the stored activations, "float16", "bfloat16" or "int8" (see `store.quantise`).
    hardware: devices and strategy of the Lightning trainer.

    Returns
    -------
    Whether this process is the first of the run (the one that finishes the output).

    Raises
    ------
    UserError: an activation is not finite in `dtype`, or what other nodes wrote is not in `folder`.
    """
    # Weights cut into pieces are put together in place, which tensors made for inference only do not allow.
    loop = trainer(hardware, inference_mode=hardware.strategy != "fsdp")
    # All processes see the same: none begins to write before all have come to `predict`.
    missing = {shard.number for shard in shards if not _complete(folder, hookpoints, shard)}
    world = loop.world_size
    parts = [[shard for shard in shards[rank::world] if shard.number in missing] for rank in range(world)]
    mine = parts[loop.global_rank]
    total = sum(shard.rows for shard in shards)
    with Progress("extract", total, "tokens") as progress:
        progress.skip(total - sum(shard.rows for shard in mine))
        loop.callbacks.append(ShardWriter(mine, folder, progress, quantised=dtype == "int8"))
        todo = [batch for shard in mine for batch in shard.batches]
        if is_sharding(loop) and missing:
            longest = max(sum(len(shard.batches) for shard in part) for part in parts)
            todo += [shards[0].batches[0]] * (longest - len(todo))
        loader: Any = DataLoader(todo, batch_size=None, collate_fn=collate)  # type: ignore[arg-type]
        # Every rank, also one with nothing left of its own: the others wait for it.
        if missing:
            loop.predict(Extractor(model, hookpoints, DTYPES[dtype]), loader, return_predictions=False)
    if loop.world_size > 1:
        loop.strategy.barrier()
    if loop.is_global_zero and not all(_complete(folder, hookpoints, shard) for shard in shards):
        raise UserError(f"{folder}: lacks what other processes wrote; several nodes must share the working folder")
    return bool(loop.is_global_zero)


def _complete(folder: Path, hookpoints: Sequence[str], shard: Shard) -> bool:
    return all((store.place(folder, name) / store.shard_name(shard.number)).is_file() for name in hookpoints)
