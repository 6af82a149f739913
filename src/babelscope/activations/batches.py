"""Training batches from the activation store: which rows a batch holds, and reading them."""

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from babelscope.activations.moments import Moments, moments
from babelscope.activations.store import ActivationStore
from babelscope.models.matmul import linear

# Minimum rows in the sample for mean and covariance (all rows if there are fewer), and rows read at once.
_SAMPLE, _CHUNK = 2**18, 8192
# Batches whose rows are looked up and sorted at once. For single batches, this took a third of the time of reading.
_BLOCK = 64
# Maximum number of bytes in which whitened rows are kept for the next pass. Whitening them again would take a quarter
# of a step on a CPU (docs/training.md).
_KEPT = 2**30


class Pair(NamedTuple):
    """Activations of the same tokens at one hookpoint.

    Attributes
    ----------
    x: [rows, d_in], activations to encode, as stored.
    y: [rows, d], activations to reconstruct, as stored; None: x.
    normal: float32 [rows, d_in], `x` normalised; None: not computed yet.
    """

    x: Tensor
    y: Tensor | None = None
    normal: Tensor | None = None

    def each(self, change: Callable[[Tensor], Tensor]) -> "Pair":
        """`change` applied to all parts."""
        return Pair(change(self.x), *(part if part is None else change(part) for part in self[1:]))


class Source(Protocol):
    """Batches of activations to train the SAEs of one or several hookpoints on; batch n depends on n alone.

    Attributes
    ----------
    steps, size: number of batches, and rows in a batch over all devices.
    processes: number of processes that each get whole batches of their own hookpoints only (number i is that of process
        i % processes); 1: every process gets its share of the rows, at all hookpoints.
    """

    steps: int
    size: int
    processes: int

    def moments(self) -> list[tuple[Moments, Moments | None]]:
        """For every hookpoint, the moments of the activations to reconstruct, and of those to encode if they differ."""
        ...

    def read(self, first: int = 0, rank: int = 0, world: int = 1) -> Iterator[list[Pair]]:
        """Yield the batches from number `first` on: the share [size / world, d] of device `rank` at every hookpoint."""
        ...


def permutation(seed: int, epoch: int, rows: int) -> Tensor:
    """Order of the rows in one pass over the data, int64 [rows]: a pure function of its arguments."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(rows, generator=generator)


class Batches:
    """Batches from the stores of one hookpoint: batch `step` is a pure function of (seed, step, rows).

    Parameters
    ----------
    store: the activations to reconstruct.
    rows: int64 [m], the rows of `store` to train on.
    size: rows in a batch over all devices.
    steps: number of batches. They take as many passes over the rows as needed, each in another order.
    inputs: the activations to encode (transcoders), row for row; None: `store`.
    pin: for a GPU: read into page-locked memory, from which the GPU copies while it computes, and do not keep whitened
        rows, since the GPU whitens faster than it copies.
    """

    processes = 1

    def __init__(
        self,
        store: ActivationStore,
        rows: Tensor,
        size: int,
        steps: int,
        seed: int,
        inputs: ActivationStore | None = None,
        *,
        pin: bool = False,
    ) -> None:
        self.store, self.rows, self.size, self.steps, self.seed = store, rows, size, steps, seed
        self.inputs, self.pin = inputs, pin
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)
        self._block, self._rows = -1, torch.empty(0, dtype=torch.int64)
        self._moments: list[tuple[Moments, Moments | None]] = []
        self._whitened: _Whitened | None = None

    def rows_of(self, step: int) -> Tensor:
        """The store's rows in batch number `step`, int64 [size], ascending so that a disk reads forward."""
        block, number = divmod(step, _BLOCK)
        if block != self._block:
            self._block, self._rows = block, self._rows_of_block(block * _BLOCK * self.size)
        return self._rows[number]

    def _rows_of_block(self, start: int) -> Tensor:
        end, parts = start + _BLOCK * self.size, []
        while start < end:
            epoch, offset = divmod(start, len(self.rows))
            if epoch != self._epoch:
                self._epoch, self._order = epoch, permutation(self.seed, epoch, len(self.rows))
            parts.append(self._order[offset : offset + end - start])
            start += len(parts[-1])
        return self.rows[torch.cat(parts)].view(_BLOCK, self.size).sort(dim=1).values

    def read(self, first: int = 0, rank: int = 0, world: int = 1) -> Iterator[list[Pair]]:
        """Yield the batches from number `first` on: the share [size / world, d] of device `rank`, in the store's dtype.

        The calling thread reads: on two cores, a separate thread cost more than it gained, and a GPU still computes the
        previous step while this thread reads.
        """
        # Of several processes, each gets other rows in every pass, so it would seldom find all rows of a batch.
        whitened = self._whitening() if world == 1 else None
        for step in range(first, self.steps):
            rows = self.rows_of(step)[rank::world].contiguous()
            target = self._gather(self.store, rows)
            if self.inputs is None:
                yield [Pair(target, None, None if whitened is None else whitened(rows, target))]
            else:
                yield [Pair(self._gather(self.inputs, rows), target)]

    def _whitening(self) -> "_Whitened | None":
        """The whitened rows to keep; None on a GPU, for a transcoder, and if they do not fit or do not come again."""
        fits, again = 4 * self.store.rows * self.store.d <= _KEPT, self.steps * self.size > len(self.rows)
        if self._whitened is None and fits and again and not self.pin and self.inputs is None:
            whitening = self.moments()[0][0].whitening()
            if whitening is not None:
                self._whitened = _Whitened(whitening[0], self.store.rows)
        return self._whitened

    def _gather(self, store: ActivationStore, rows: Tensor) -> Tensor:
        if not self.pin:
            return store.gather(rows)
        return store.gather(rows, torch.empty((len(rows), store.d), dtype=store.dtype, pin_memory=True))

    def moments(self) -> list[tuple[Moments, Moments | None]]:
        """The moments of all rows, or of a sample if there are many; computed once."""
        if not self._moments:
            inputs = None if self.inputs is None else self._moments_of(self.inputs)
            self._moments = [(self._moments_of(self.store), inputs)]
        return self._moments

    def _moments_of(self, store: ActivationStore) -> Moments:
        rows = self.rows[:: max(1, len(self.rows) // _SAMPLE)]
        chunks = (store.gather(rows[first : first + _CHUNK]) for first in range(0, len(rows), _CHUNK))
        return moments(chunks, str(store.index.get("hookpoint", "a hookpoint")))


class _Whitened:
    """Whitened rows of a store: the first batch with a row computes it, and later batches read it."""

    def __init__(self, forth: Tensor, rows: int) -> None:
        self.forth = forth
        self.kept, self.known = torch.empty(rows, len(forth)), torch.zeros(rows, dtype=torch.bool)

    def __call__(self, rows: Tensor, x: Tensor) -> Tensor:
        """`x`, the rows of these numbers, whitened as by `sae.training.learner.Normal`."""
        if bool(self.known[rows].all()):
            return self.kept[rows]
        whitened = linear(x.float(), self.forth)
        self.kept[rows], self.known[rows] = whitened, True
        return whitened
