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

_KEY, _SCALES = "activations", "scales"


def place(folder: Path, hookpoint: str) -> Path:
    """Where the activations of a hookpoint lie in `folder`: those of `<hookpoint>.input` in `<hookpoint>/input`."""
    base = hookpoint.removesuffix(".input")
    return folder / base if base == hookpoint else folder / base / "input"


def shard_name(number: int) -> str:
    """File name of the shard with this number."""
    return f"shard-{number:05d}.safetensors"


def quantise(activations: Tensor) -> tuple[Tensor, Tensor]:
    """Each row in 255 steps, evenly spaced and symmetric around 0: `x ~ q * scale`.

    Absmax quantisation by row (Dettmers et al. 2022, arXiv 2208.07339, section 2.1): the largest magnitude of a row is
    127 steps, so that no number is off by more than half a step, 1 / 254 of it.

    Parameters
    ----------
    activations: `[rows, d]`, any floating dtype, finite.

    Returns
    -------
    q: int8 `[rows, d]`, -127..127.
    scale: float32 `[rows]`, 0 for a row of zeros.
    """
    x = activations.float()
    scale = x.abs().amax(1) / 127
    steps = x / scale.where(scale > 0, 1.0).unsqueeze(1)
    return steps.round_().clamp_(-127, 127).to(torch.int8), scale


def dequantise(q: Tensor, scale: Tensor) -> Tensor:
    """The activations that int8 `q` `[rows, d]` and float32 `scale` `[rows]` stand for: float32 `[rows, d]`."""
    return q.float().mul_(scale.unsqueeze(1))


def write_shard(folder: Path, number: int, activations: Tensor, *, quantised: bool = False) -> None:
    """Write one shard `[rows, d]` to `folder`, whole or not at all; as `quantise` makes it, where `quantised`."""
    content = {_KEY: activations.contiguous()}
    if quantised:
        content = dict(zip((_KEY, _SCALES), quantise(activations), strict=True))
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
    dtype: dtype of the activations that it gives: the stored one, or float32 where they are stored in int8.
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
        self._scales: list[Tensor | None] = []
        for path, rows in shards:
            try:
                with safe_open(path, framework="pt") as handle:
                    shard = handle.get_tensor(_KEY)
                    scales = handle.get_tensor(_SCALES) if shard.dtype == torch.int8 else None
            except (OSError, SafetensorError) as error:
                raise UserError(f"{path}: missing or corrupt shard ({error})") from None
            if tuple(shard.shape) != (rows, self.d):
                raise UserError(f"{path}: shape {tuple(shard.shape)}, but index.json says {(rows, self.d)}")
            if scales is not None and scales.shape != (rows,):
                raise UserError(f"{path}: {tuple(scales.shape)} scales for {rows} rows")
            self._shards.append(shard)
            self._scales.append(scales)
        self.dtype = self._shards[0].dtype if self._shards else torch.float16
        if self.dtype == torch.int8:
            self.dtype = torch.float32
        self._starts = torch.tensor([0, *(len(shard) for shard in self._shards)]).cumsum(0)
        if int(self._starts[-1]) != self.rows:
            raise UserError(f"{folder / 'index.json'}: shape says {self.rows} rows, the shards {int(self._starts[-1])}")

    def gather(self, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """The given rows (int64 `[n]`, any order) as `[n, d]` in `dtype`; in `out`, if they ascend."""
        order = None
        if not bool((rows[1:] >= rows[:-1]).all()):
            rows, order = rows.sort()
        # One copy per shard: batches are small, and what is done around the copies would cost more than they do.
        ends = torch.searchsorted(rows, self._starts).tolist()
        found = torch.empty((len(rows), self.d), dtype=self.dtype) if out is None else out
        starts = self._starts.tolist()
        for shard, scales, start, (first, end) in zip(self._shards, self._scales, starts, pairwise(ends), strict=False):
            if first < end and scales is None:
                torch.index_select(shard, 0, rows[first:end] - start, out=found[first:end])
            elif first < end and scales is not None:
                here = rows[first:end] - start
                found[first:end] = dequantise(shard.index_select(0, here), scales.index_select(0, here))
        return found if order is None else torch.empty_like(found).index_copy_(0, order, found)

    def chunks(self, size: int) -> Iterator[tuple[int, Tensor]]:
        """All rows in order: pairs of the first row's number and `[at most size, d]` in `dtype`."""
        for number, (shard, scales) in enumerate(zip(self._shards, self._scales, strict=True)):
            for start in range(0, len(shard), size):
                part = shard[start : start + size]
                yield (
                    int(self._starts[number]) + start,
                    part if scales is None else dequantise(part, scales[start : start + size]),
                )
