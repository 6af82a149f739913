"""Which rows make which training batch, and reading them from the activation store."""

from collections.abc import Iterator

import torch
from torch import Tensor

from babelscope.activations.store import ActivationStore

# Rows read at once when all rows are passed over.
_CHUNK = 8192


def permutation(seed: int, epoch: int, rows: int) -> Tensor:
    """Order of the rows in one pass over the data, int64 [rows]: a pure function of its arguments."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(rows, generator=generator)


class Batches:
    """The batches of a run: batch number `step` is a pure function of (seed, step, rows), for any number of devices.

    Parameters
    ----------
    store: where the activations lie.
    rows: int64 [m], the rows of `store` to train on.
    size: rows per step, over all devices together.
    steps: number of batches; the rows are passed over as often as it takes, each time in another order.
    seed: of the order.
    """

    def __init__(self, store: ActivationStore, rows: Tensor, size: int, steps: int, seed: int) -> None:
        self.store, self.rows, self.size, self.steps, self.seed = store, rows, size, steps, seed
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def rows_of(self, step: int) -> Tensor:
        """The store's rows in batch number `step`, ascending (so that a disk reads forward): int64 [size]."""
        place, end, parts = step * self.size, (step + 1) * self.size, []
        while place < end:
            epoch, offset = divmod(place, len(self.rows))
            if epoch != self._epoch:
                self._epoch, self._order = epoch, permutation(self.seed, epoch, len(self.rows))
            parts.append(self._order[offset : offset + end - place])
            place += len(parts[-1])
        return self.rows[torch.cat(parts)].sort().values

    def read(self, first: int = 0, rank: int = 0, world: int = 1) -> Iterator[Tensor]:
        """From batch number `first` on, the share [size / world, d] of device `rank`, in the dtype of the store."""
        for step in range(first, self.steps):
            yield self.store.gather(self.rows_of(step)[rank::world].contiguous())

    def moments(self) -> tuple[Tensor, float]:
        """Mean row, float32 [d], and mean squared norm of all rows (summed in float64 over chunks)."""
        total, squares = torch.zeros(self.store.d, dtype=torch.float64), 0.0
        for first in range(0, len(self.rows), _CHUNK):
            x = self.store.gather(self.rows[first : first + _CHUNK]).float()
            total += x.sum(0)
            squares += float(x.square_().sum())
        return (total / len(self.rows)).float(), squares / len(self.rows)
