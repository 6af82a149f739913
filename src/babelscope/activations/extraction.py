"""Extraction: one forward pass over all texts that writes the activations of all hookpoints, shard by shard."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import torch

from babelscope.activations import store
from babelscope.config.schema import Hardware
from babelscope.core.errors import UserError
from babelscope.core.progress import Progress
from babelscope.models.forward import read_batches
from babelscope.models.hardware import device_count, prepare
from babelscope.models.hookpoints import shard_blocks
from babelscope.models.loading import DTYPES
from babelscope.models.tokens import TokenizedTexts

# Rows in a shard: few enough that a killed run loses little, and enough to keep the number of files small.
SHARD_ROWS = 16384


@dataclass(frozen=True)
class Shard:
    """Consecutive batches, as the numbers of their texts, whose content tokens are the rows of one shard."""

    number: int
    batches: list[list[int]]
    rows: int


def plan(texts: TokenizedTexts, batch_tokens: int, shard_rows: int = SHARD_ROWS) -> list[Shard]:
    """Cut the texts into batches, and the batches into shards of about `shard_rows` rows."""
    shards: list[Shard] = []
    current: list[list[int]] = []
    rows, batches = 0, texts.batches(batch_tokens)
    for number, batch in enumerate(batches, start=1):
        current.append(batch)
        rows += int(texts.lengths[batch].sum())
        if rows >= shard_rows or number == len(batches):
            shards.append(Shard(len(shards), current, rows))
            current, rows = [], 0
    return shards


def padding_share(texts: TokenizedTexts, shards: Sequence[Shard]) -> float:
    """The share of padding among the computed positions."""
    lengths = [texts.lengths[batch] + len(texts.special) for shard in shards for batch in shard.batches]
    computed = sum(len(batch) * int(batch.max()) for batch in lengths)
    return 1 - sum(int(batch.sum()) for batch in lengths) / computed if computed else 0.0


def token_table(texts: TokenizedTexts, shards: Sequence[Shard]) -> pl.DataFrame:
    """The row order of every activation file: `row`, `text_id`, `language`, `split`, `position`, `token_id`.

    `position` counts a text's content tokens from 0. `texts.frame` must have `language` and `split`.
    """
    order = [number for shard in shards for batch in shard.batches for number in batch]
    table = texts.frame[order].select(
        "text_id", "language", "split",
        position=pl.int_ranges(0, pl.col("tokens"), dtype=pl.Int32), token_id="token_ids",
    )  # fmt: skip
    table = table.explode("position", "token_id").with_row_index("row")
    return table.with_columns(pl.col("row").cast(pl.Int64))


class _Processes(NamedTuple):
    """The processes of a run: the number of this one, the number of all, and a function that waits for all."""

    rank: int = 0
    world: int = 1
    wait: Callable[[], object] = lambda: None


def _launch(model: Any, hardware: Hardware) -> _Processes:
    """Move the model to its device; if the run has several processes, start the others and wait for them."""
    device = prepare(hardware)
    if device_count(hardware) * hardware.num_nodes == 1:
        model.to(device)
        return _Processes()
    from lightning.fabric import Fabric  # on demand: its import takes seconds
    from lightning.fabric.strategies import ModelParallelStrategy

    strategy: Any = hardware.strategy
    if strategy == "fsdp":  # Lightning's strategy of that name is the older FSDP, which does not run on CPUs
        strategy = ModelParallelStrategy(lambda module, mesh: module, device_count(hardware) * hardware.num_nodes, 1)
    try:
        fabric = Fabric(
            accelerator=device.type, devices=hardware.devices, num_nodes=hardware.num_nodes, strategy=strategy
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(f"params.yaml: hardware: {' '.join(str(error).split())}") from None
    fabric.launch()
    model.to(fabric.device)
    if hardware.strategy == "fsdp":
        shard_blocks(model, strategy.device_mesh["data_parallel"])
    return _Processes(fabric.global_rank, fabric.world_size, fabric.barrier)


def extract(
    model: Any,
    texts: TokenizedTexts,
    shards: Sequence[Shard],
    hookpoints: Sequence[str],
    folder: Path,
    dtype: str,
    hardware: Hardware,
) -> bool:
    """Write `folder/<hookpoint>/shard-*.safetensors` for every missing shard.

    Each of several processes writes whole shards. The batches of a shard depend on the texts alone, so the bytes are
    those that a single process writes. Under FSDP, the devices send each other the weights of each block, so a device
    that has no batches left repeats one until the others are done.

    Parameters
    ----------
    texts, shards: the plan of the whole run; each of n processes takes every n-th shard.
    hookpoints: names to read, see `babelscope.models.forward.names_to_read`.
    folder: folder for the shards; those that an interrupted run left there are kept. Several nodes must share it.
    dtype: dtype of the stored activations, "float16", "bfloat16" or "int8" (see `store.quantise`).
    hardware: devices and strategy.

    Returns
    -------
    Whether this process is the first of the run, which finishes the output.

    Raises
    ------
    UserError: an activation is not finite in `dtype`, or the shards of other nodes are missing from `folder`.
    """
    # Every process finds the same shards missing, since none writes before all have been launched.
    missing = {shard.number for shard in shards if not _complete(folder, hookpoints, shard)}
    rank, world, wait = _launch(model, hardware)
    shares = [[shard for shard in shards[first::world] if shard.number in missing] for first in range(world)]
    batches = [[batch for shard in share for batch in shard.batches] for share in shares]
    if hardware.strategy == "fsdp" and missing:
        batches[rank] += [shards[0].batches[0]] * (max(map(len, batches)) - len(batches[rank]))
    passes = read_batches(model, texts, batches[rank], hookpoints, DTYPES[dtype])
    total = sum(shard.rows for shard in shards)
    with Progress("extract", total, "tokens") as progress:
        progress.skip(total - sum(shard.rows for shard in shares[rank]))
        for shard in shares[rank]:
            parts: dict[str, list[torch.Tensor]] = {name: [] for name in hookpoints}
            for activations, text in islice(passes, len(shard.batches)):
                for name, x in activations.items():
                    parts[name].append(x.cpu())
                progress.update(len(text))
            for name, rows in parts.items():
                store.write_shard(folder / name, shard.number, torch.cat(rows), quantised=dtype == "int8")
        for _ in passes:
            pass
    wait()
    if rank == 0 and not all(_complete(folder, hookpoints, shard) for shard in shards):
        raise UserError(f"{folder}: shards of other processes are missing; all nodes must share the working folder")
    return rank == 0


def _complete(folder: Path, hookpoints: Sequence[str], shard: Shard) -> bool:
    return all((folder / name / store.shard_name(shard.number)).is_file() for name in hookpoints)
