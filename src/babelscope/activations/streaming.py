"""Training batches computed while training runs, for corpora whose activations do not fit on a disk."""

from collections.abc import Iterator, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from babelscope.activations.batches import Pair, permutation
from babelscope.activations.moments import Moments, moments
from babelscope.models.forward import names_to_read, read_divided
from babelscope.models.hookpoints import device_of
from babelscope.models.names import input_name
from babelscope.models.processes import rank, together
from babelscope.models.tokens import TokenizedTexts

# Rows are shuffled within blocks of this many training batches, and of at least this many rows.
_BATCHES, _ROWS = 16, 16384
# Rows whose moments are summed at once.
_CHUNK = 8192


class Stream:
    """A `batches.Source` that computes rows when they are needed, at several hookpoints at once.

    Every epoch takes the texts in another order, in blocks of about `block_rows` tokens. One block of activations at a
    time is in memory, and its rows are shuffled. The blocks depend on (seed, epoch) alone, and the order of rows in a
    block on (seed, block). Batch `step` is `size` rows of one endless sequence in which every token of the corpus
    occurs once per epoch. Resuming costs the forward pass over one block (and over the first one, for the moments).

    The memory in bytes, with D the sum of the hookpoints' widths (for transcoders also of their inputs' widths), is

        2 D (block_rows + 4 size)  the block, and batches: one in training, one fetched, one being assembled
        + 12 D batch_tokens        the activations of one forward pass, in the model's dtype and in the block's
        + 4 tokens + 100 texts     the corpus
        + the model and its forward pass over batch_tokens tokens

    The trainer adds 16 bytes per weight of the SAEs (gradients and Adam's moments included) and about 20 bytes per
    number in a batch at each hookpoint. Nothing grows with the number of steps. In a measurement (VmHWM; SmolLM2-135M
    in bfloat16, D = 3 x 576, 4,608 latents, batches of 1,024, forward passes of 2,048 tokens, four blocks), training
    took 475 MiB in addition to the loaded model, 243 MiB of them for the SAEs' weights. The terms above give 476 MiB,
    with 40 MiB for the forward pass and 51 MiB for caches that stage `stream` bounds (else they grew 50 MiB a block).

    Several processes can divide the hookpoints: each computes a share of the forward passes, keeps the block at its own
    hookpoints only, and gets whole batches there. D is then the sum of all widths for a forward pass, which takes
    20 D batch_tokens bytes (what is sent and received included), and that of the own ones for the block and batches.
    Otherwise each of several devices computes every block in full and takes its share of each batch.

    Parameters
    ----------
    model: a causal language model, on the device for the forward pass and the block.
    texts: texts of the training split, at least one.
    hookpoints: names of the hookpoints.
    transcode: whether to encode the inputs of the hookpoints' modules.
    dtype: dtype of the activations (`extract.store_dtype`, so that the values are those of stored activations).
    batch_tokens: tokens in one forward pass, padding included.
    size, steps: rows in a batch over all devices, and number of batches.
    seed: seed of all orders.
    block_rows: rows in a block; None: the rows of 16 batches, and at least 16,384.
    processes: the number of processes that divide the hookpoints (see `hardware.divides`); they must be all of the run.
    """

    def __init__(
        self,
        model: Any,
        texts: TokenizedTexts,
        hookpoints: Sequence[str],
        *,
        transcode: bool,
        dtype: torch.dtype,
        batch_tokens: int,
        size: int,
        steps: int,
        seed: int,
        block_rows: int | None = None,
        processes: int = 1,
    ) -> None:
        self.model, self.texts, self.processes = model, texts, processes
        self.shares = [list(hookpoints[first::processes]) for first in range(processes)]
        self.transcode, self.dtype, self.batch_tokens = transcode, dtype, batch_tokens
        self.size, self.steps, self.seed = size, steps, seed
        self.block_rows = block_rows or max(_BATCHES * size, _ROWS)
        self.rows = int(texts.lengths.sum())
        self._held = -1  # where the block in the buffers begins in the endless sequence
        self._rows = 0
        # All blocks share these buffers, since buffers of varying sizes would fragment the memory.
        self._buffers: dict[str, Tensor] = {}

    @property
    def hookpoints(self) -> list[str]:
        """The names of the hookpoints of this process."""
        return self.shares[rank() if self.processes > 1 else 0]

    def moments(self) -> list[tuple[Moments, Moments | None]]:
        """The moments of the first block, about `block_rows` tokens of randomly drawn texts, which `read` then reuses.

        Moments of the whole corpus would cost a forward pass over all of it.
        """
        block = self._block(0, self._blocks(0)[0])
        parts = [(pair.x, None) if pair.y is None else (pair.y, pair.x) for pair in block]
        return together(
            lambda: [
                (_moments(target, name), None if source is None else _moments(source, name))
                for name, (target, source) in zip(self.hookpoints, parts, strict=True)
            ],
            device_of(self.model),
        )

    def read(self, first: int = 0, rank: int = 0, world: int = 1) -> Iterator[list[Pair]]:
        """Yield the batches from number `first` on: the share [size / world, d] of device `rank` at every hookpoint.

        Raises
        ------
        UserError: an activation is not finite in `dtype`.
        """
        parts: list[list[Pair]] = []
        step, pieces = first, self._pieces(first * self.size)
        while step < self.steps:
            parts.append(next(pieces))
            if sum(len(part[0][0]) for part in parts) < self.size:
                continue
            batch = [_joined([part[i] for part in parts]) for i in range(len(self.hookpoints))]
            parts, step = [], step + 1
            yield [pair.each(lambda part: part[rank::world].contiguous()) for pair in batch]

    def _pieces(self, row: int) -> Iterator[list[Pair]]:
        """Yield the endless sequence from row number `row` on, in pieces that end with a block or a batch."""
        while True:
            epoch, offset = divmod(row, self.rows)
            for numbers in self._blocks(epoch):
                count, start = int(self.texts.lengths[numbers].sum()), row - offset
                if offset >= count:
                    offset -= count
                    continue
                order = permutation(self.seed, -1 - start, count)
                while offset < count:
                    block = self._block(start, numbers)
                    rows = order[offset : min(count, offset + self.size - row % self.size)].to(block[0][0].device)
                    yield [pair.each(itemgetter(rows)) for pair in block]
                    offset, row = offset + len(rows), row + len(rows)
                offset = 0

    def _blocks(self, epoch: int) -> list[Tensor]:
        """The numbers of every block's texts in the epoch's order; a text is in the block in which it begins."""
        order = permutation(self.seed, epoch, len(self.texts))
        lengths = self.texts.lengths[order]
        block = (lengths.cumsum(0) - lengths) // self.block_rows
        return list(torch.split(order, torch.bincount(block).tolist()))

    def _block(self, start: int, numbers: Tensor) -> list[Pair]:
        """The activations of these texts at every hookpoint, [rows, d], as views of the buffers."""
        if self._held != start:
            self._held = -1  # an exception would leave the buffers half-filled
            self._compute(numbers)
            self._held = start
        block = {name: buffer[: self._rows] for name, buffer in self._buffers.items()}
        return [
            Pair(block[input_name(name, True)], block[name]) if self.transcode else Pair(block[name])
            for name in self.hookpoints
        ]

    def _compute(self, numbers: Tensor) -> None:
        """Fill the buffers with the activations of these texts, in `by_length` order."""
        names = [names_to_read(share, self.transcode) for share in self.shares]
        most = min(self.rows, self.block_rows + int(self.texts.lengths.max()))
        self._rows = 0
        batches = self.texts.batches(self.batch_tokens, numbers.tolist())
        for activations, text in read_divided(self.model, self.texts, batches, names, self.dtype):
            end = self._rows + len(text)
            for name, x in activations.items():
                if name not in self._buffers:
                    self._buffers[name] = x.new_empty(most, x.shape[1])
                self._buffers[name][self._rows : end] = x
            self._rows = end


def _joined(parts: list[Pair]) -> Pair:
    if len(parts) == 1:
        return parts[0]
    targets = [part.y for part in parts if part.y is not None]
    return Pair(torch.cat([part.x for part in parts]), torch.cat(targets) if targets else None)


def _moments(x: Tensor, name: str) -> Moments:
    found = moments(torch.split(x, _CHUNK), name)
    return Moments(found.mean.cpu(), found.covariance.cpu())
