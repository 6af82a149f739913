"""SAEs that are read when they are used, for where all of them together do not fit into memory.

Sixteen dictionaries of 131,072 latents at d = 2048 are 32 GiB. What works through the layers of a model needs one at a
time.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from babelscope.sae import checkpoint
from babelscope.sae.autoencoder import SAE

# Bytes of weights that are held on a CPU; on a GPU half of what is free there.
_ROOM = 4 * 2**30


class Shelved:
    """One of a `Shelf`: used like the `SAE` that it is, it reads the weights where they are not at hand.

    Attributes
    ----------
    latents, d, d_in, b_dec, b_in: as in `SAE`; always at hand.
    """

    def __init__(self, shelf: "Shelf", name: str, sae: SAE) -> None:
        self._shelf, self._name = shelf, name
        self.latents, self.d, self.d_in = sae.latents, sae.d, sae.d_in
        self.b_dec = sae.b_dec.detach().clone()
        self.b_in = None if sae.b_in is None else sae.b_in.clone()

    @property
    def W_dec(self) -> Tensor:  # noqa: N802
        """Decoder weights, float32 `[n, d]`."""
        return self._shelf.take(self._name).W_dec

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `SAE.encode`."""
        return self._shelf.take(self._name).encode(x)

    def __call__(self, x: Tensor) -> Tensor:
        """Reconstruct, see `SAE.forward`."""
        reconstructed: Tensor = self._shelf.take(self._name)(x)
        return reconstructed


class Shelf(Mapping[str, Shelved]):
    """The SAEs of a folder by hookpoint. As many as there is room for stay in memory; the others are read again.

    Taken in turns, as layers are, the first ones stay and the others take turns in what is left.

    Parameters
    ----------
    folder: with one folder per hookpoint. Every SAE in it is read once, so that a broken one is found before long work.
    hookpoints: their names, in the order of the mapping.
    device: where they are used.
    room: bytes of weights to hold, of one SAE at least; null: 4 GiB on a CPU, half of the free memory of a GPU.

    Raises
    ------
    UserError: a file is missing or corrupt, see `checkpoint.load`.
    """

    def __init__(
        self, folder: Path, hookpoints: Sequence[str], device: torch.device | None = None, room: int | None = None
    ) -> None:
        self.folder, self.device = folder, device or torch.device("cpu")
        self.room = _room(self.device) if room is None else room
        self._held: dict[str, SAE] = {}
        self._bytes: dict[str, int] = {}
        self._books: dict[str, Shelved] = {}
        for name in hookpoints:
            self._books[name] = Shelved(self, name, self.take(name))
        if len(self._held) < len(self._books):
            self._held.clear()  # what comes next, loading a model say, needs memory, too

    def take(self, name: str) -> SAE:
        """The SAE itself, on `device`."""
        if name not in self._held:
            expected = self._bytes.get(name, max(self._bytes.values(), default=0))
            while self._held and sum(self._bytes[held] for held in self._held) + expected > self.room:
                self._held.popitem()
            sae = checkpoint.load(self.folder, name).to(self.device)
            self._bytes[name] = sum(t.nbytes for t in (*sae.parameters(), *sae.buffers()))
            self._held[name] = sae
        return self._held[name]

    def __getitem__(self, name: str) -> Shelved:
        return self._books[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._books)

    def __len__(self) -> int:
        return len(self._books)


def _room(device: torch.device) -> int:
    if device.type != "cuda":
        return _ROOM
    free, _ = torch.cuda.mem_get_info(device)
    return int(free) // 2
