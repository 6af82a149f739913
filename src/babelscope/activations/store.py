"""Activations on disk: safetensors shards `[rows, d]` and an `index.json` that lists them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from babelscope.core.errors import UserError
from babelscope.core.files import read_json, write_atomically, write_json
from babelscope.core.paths import Paths

_KEY = "activations"
# Names of the tensors in an int8 shard, in the order of `Quantised`'s fields.
_QUANTISED = (_KEY, "scales", "mean", "deviation")
# Rows converted to float64 at once.
_CHUNK = 1024


def shard_name(number: int) -> str:
    """File name of the shard with this number."""
    return f"shard-{number:05d}.safetensors"


class Quantised(NamedTuple):
    """Rows in int8: `x ~ mean + deviation * (scale[:, None] * q)`.

    Attributes
    ----------
    q: int8 `[rows, d]`, -127 to 127.
    scale: float32 `[rows]`.
    mean, deviation: float32 `[d]`, mean and standard deviation of the columns.
    """

    q: Tensor
    scale: Tensor
    mean: Tensor
    deviation: Tensor

    def rows(self, which: Tensor) -> Tensor:
        """The rows `which` as float32 `[n, d]`."""
        part = self.q[which].float().mul_(self.scale[which].unsqueeze(1))
        return part.mul_(self.deviation).add_(self.mean)


def quantise(activations: Tensor) -> Quantised:
    """Standardise the columns, then round each row to 255 evenly spaced steps, symmetric around 0.

    This is absmax quantisation by row (Dettmers et al. 2022, arXiv 2208.07339, section 2.1): the largest absolute value
    of a row is 127 steps. The columns are standardised because a few of them are often a hundred times larger than all
    others, for which few steps would remain (ibid., section 4).

    Parameters
    ----------
    activations: `[rows, d]`, any floating dtype, finite.
    """
    x = activations.float()
    mean, square = (_column_means(x, power) for power in (1, 2))
    deviation = (square - mean**2).clip(0) ** 0.5
    centre, unit = (torch.from_numpy(each).float() for each in (mean, deviation))
    x = (x - centre) / unit.where(unit > 0, 1.0)
    scale = x.abs().amax(1) / 127
    q = (x / scale.where(scale > 0, 1.0).unsqueeze(1)).round_().clamp_(-127, 127).to(torch.int8)
    return Quantised(q, scale, centre, unit)


def _column_means(x: Tensor, power: int) -> NDArray[np.float64]:
    """Column means of `x**power`, summed in the same order on every machine (PyTorch's order depends on threads)."""
    total = np.zeros(x.shape[1])
    for first in range(0, len(x), _CHUNK):
        total += (x[first : first + _CHUNK].double().numpy() ** power).sum(0)
    return total / max(1, len(x))


def write_shard(folder: Path, number: int, activations: Tensor, *, quantised: bool = False) -> None:
    """Write one shard `[rows, d]` to `folder`, atomically; in int8 if `quantised`."""
    content = {_KEY: activations.contiguous()}
    if quantised:
        content = dict(zip(_QUANTISED, quantise(activations), strict=True))
    write_atomically(folder / shard_name(number), lambda path: save_file(content, path))


def write_index(folder: Path, shard_rows: Sequence[int], d: int, dtype: str, model: str, hookpoint: str) -> None:
    """Write `index.json`: shape and dtype of the store, model, hookpoint, and the number of rows in each shard."""
    shards = [{"file": shard_name(number), "rows": rows} for number, rows in enumerate(shard_rows)]
    content = {"dtype": dtype, "model": model, "hookpoint": hookpoint, "shards": shards}
    write_json(folder / "index.json", content | {"shape": [sum(shard_rows), d]})


def opened(paths: Paths, hookpoint: str) -> "ActivationStore":
    """All stored activations at a hookpoint, or of an input (`names.input_name`); the rows are those of `read_rows`."""
    found, further = ActivationStore(paths.activations / hookpoint), paths.extended / hookpoint
    if further.is_dir():
        found.append(ActivationStore(further))
    return found


class ActivationStore:
    """The activations of one hookpoint, memory-mapped: only the requested rows are read.

    Attributes
    ----------
    rows, d: shape of the store.
    dtype: dtype of the rows that `gather` returns: the stored one, or float32 if they are stored in int8.
    index: the content of `index.json`.

    Raises
    ------
    UserError: the folder has no index, or a shard is missing, is corrupt, or does not have the shape in the index.
    """

    def __init__(self, folder: Path) -> None:
        try:
            self.index: dict[str, Any] = read_json(folder / "index.json")
            self.rows, self.d = (int(n) for n in self.index["shape"])
            shards = [(folder / shard["file"], int(shard["rows"])) for shard in self.index["shards"]]
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise UserError(f"{folder / 'index.json'}: not a store of activations ({error})") from None
        self._shards = [self._open(path, rows) for path, rows in shards]
        first = self._shards[0] if self._shards else torch.empty(0, dtype=torch.float16)
        self.dtype = torch.float32 if isinstance(first, Quantised) else first.dtype
        self._starts = torch.tensor([0, *(rows for _, rows in shards)]).cumsum(0)
        if int(self._starts[-1]) != self.rows:
            raise UserError(f"{folder / 'index.json'}: a shape of {self.rows} rows, but shards of {self._starts[-1]}")

    def _open(self, path: Path, rows: int) -> Tensor | Quantised:
        try:
            with safe_open(path, framework="pt") as handle:
                whole: Tensor = handle.get_tensor(_KEY)
                parts = [handle.get_tensor(name) for name in _QUANTISED] if whole.dtype == torch.int8 else []
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(f"{path}: missing or corrupt shard ({error})") from None
        if tuple(whole.shape) != (rows, self.d):
            raise UserError(f"{path}: shape {tuple(whole.shape)}, but index.json says {(rows, self.d)}")
        if parts and [part.shape for part in parts[1:]] != [(rows,), (self.d,), (self.d,)]:
            raise UserError(f"{path}: {', '.join(_QUANTISED[1:])} do not have the shapes of {(rows, self.d)} in int8")
        return Quantised(*parts) if parts else whole

    def append(self, other: "ActivationStore") -> None:
        """Let the rows of `other`, which has the same d and dtype, follow those of this store."""
        self._shards += other._shards
        self._starts = torch.cat([self._starts, other._starts[1:] + self.rows])
        self.rows += other.rows

    def gather(self, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """The given rows (int64 `[n]`, any order) as `[n, d]` in `dtype`; ascending rows are written to `out`."""
        order = None
        if not bool((rows[1:] >= rows[:-1]).all()):
            rows, order = rows.sort()
        # One call per shard: batches are small, so more calls would cost more than the copying.
        counts = torch.searchsorted(rows, self._starts).diff()
        rows = rows - self._starts[:-1].repeat_interleave(counts)
        found = torch.empty((len(rows), self.d), dtype=self.dtype) if out is None else out
        sizes = counts.tolist()
        for shard, index, part in zip(self._shards, torch.split(rows, sizes), torch.split(found, sizes), strict=True):
            if isinstance(shard, Quantised):
                part.copy_(shard.rows(index))
            elif len(index):
                torch.index_select(shard, 0, index, out=part)
        return found if order is None else torch.empty_like(found).index_copy_(0, order, found)
