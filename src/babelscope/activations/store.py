"""Activations on disk: safetensors shards `[rows, d]` and an `index.json` that lists them."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from babelscope.errors import UserError
from babelscope.files import read_json, write_atomically, write_json

_KEY = "activations"


def place(folder: Path, hookpoint: str) -> Path:
    """Where the activations of a hookpoint lie in `folder`: those of `<hookpoint>.input` in `<hookpoint>/input`."""
    base = hookpoint.removesuffix(".input")
    return folder / base if base == hookpoint else folder / base / "input"


def shard_name(number: int) -> str:
    """File name of the shard with this number."""
    return f"shard-{number:05d}.safetensors"


def write_shard(folder: Path, number: int, activations: Tensor) -> None:
    """Write one shard `[rows, d]` to `folder`, whole or not at all."""
    content = {_KEY: activations.contiguous()}
    write_atomically(folder / shard_name(number), lambda path: save_file(content, path))


def write_index(folder: Path, shard_rows: list[int], d: int, dtype: str, model: str, hookpoint: str) -> None:
    """Write `index.json`: the shape and dtype of the whole, the model and hookpoint, and the rows of each shard."""
    shards = [{"file": shard_name(number), "rows": rows} for number, rows in enumerate(shard_rows)]
    content = {
        "shape": [sum(shard_rows), d],
        "dtype": dtype,
        "model": model,
        "hookpoint": hookpoint,
        "shards": shards,
    }
    write_json(folder / "index.json", content)


class ActivationStore:
    """The activations of one hookpoint, memory-mapped: only the rows that are asked for are read.

    Attributes
    ----------
    rows, d: shape of the whole.
    dtype: dtype of the stored activations.
    index: the content of `index.json`.

    Raises
    ------
    UserError: the folder holds no index, or a shard is missing, corrupt or of another shape than the index says.
    """

    def __init__(self, folder: Path) -> None:
        try:
            self.index: dict[str, Any] = read_json(folder / "index.json")
            self.rows, self.d = (int(n) for n in self.index["shape"])
            shards = [(folder / shard["file"], int(shard["rows"])) for shard in self.index["shards"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder / 'index.json'}: not a store of activations ({error})") from None
        self._shards: list[Tensor] = []
        for path, rows in shards:
            try:
                with safe_open(path, framework="pt") as handle:
                    shard = handle.get_tensor(_KEY)
            except (OSError, SafetensorError) as error:
                raise UserError(f"{path}: missing or corrupt shard ({error})") from None
            if tuple(shard.shape) != (rows, self.d):
                raise UserError(f"{path}: shape {tuple(shard.shape)}, but index.json says {(rows, self.d)}")
            self._shards.append(shard)
        self.dtype = self._shards[0].dtype if self._shards else torch.float16
        self._starts = torch.tensor([0, *(len(shard) for shard in self._shards)]).cumsum(0)
        if int(self._starts[-1]) != self.rows:
            raise UserError(f"{folder / 'index.json'}: shape says {self.rows} rows, the shards {int(self._starts[-1])}")

    def gather(self, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """The given rows (int64 `[n]`, any order) as `[n, d]` in the stored dtype; in `out`, if they ascend."""
        order = None
        if not bool((rows[1:] >= rows[:-1]).all()):
            rows, order = rows.sort()
        # One copy per shard: batches are small, and what is done around the copies would cost more than they do.
        ends = torch.searchsorted(rows, self._starts).tolist()
        found = torch.empty((len(rows), self.d), dtype=self.dtype) if out is None else out
        for shard, start, (first, end) in zip(self._shards, self._starts.tolist(), pairwise(ends), strict=False):
            if first < end:
                torch.index_select(shard, 0, rows[first:end] - start, out=found[first:end])
        return found if order is None else torch.empty_like(found).index_copy_(0, order, found)

    def chunks(self, size: int) -> Iterator[tuple[int, Tensor]]:
        """All rows in order: pairs of the first row's number and `[at most size, d]` in the stored dtype."""
        for number, shard in enumerate(self._shards):
            for start in range(0, len(shard), size):
                yield int(self._starts[number]) + start, shard[start : start + size]
