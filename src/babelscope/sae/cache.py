"""SAEs whose weights are read when they are used, for dictionaries that do not fit into memory together.

Sixteen dictionaries of 131,072 latents at d = 2048 are 32 GiB, but code that goes through a model's layers needs one at
a time.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from babelscope.models.names import input_name
from babelscope.sae import checkpoint
from babelscope.sae.autoencoder import SAE

# Maximum bytes of weights in memory on a CPU.
_MAX_BYTES = 4 * 2**30


class CachedSAE:
    """One SAE of an `SAECache`, used like an `SAE`; it reads the weights if they are not in memory.

    Attributes
    ----------
    latents, d, d_in, b_dec, b_in, is_transcoder: as in `SAE`; always in memory.
    """

    def __init__(self, cache: "SAECache", name: str, sae: SAE) -> None:
        self._cache, self._name = cache, name
        self.latents, self.d, self.d_in, self.is_transcoder = sae.latents, sae.d, sae.d_in, sae.is_transcoder
        self.b_dec = sae.b_dec.detach().clone()
        self.b_in = None if sae.b_in is None else sae.b_in.clone()

    @property
    def W_dec(self) -> Tensor:  # noqa: N802
        """Decoder weights, float32 `[n, d]`."""
        return self._cache.get_sae(self._name).W_dec

    def input_name(self, hookpoint: str) -> str:
        """See `SAE.input_name`."""
        return input_name(hookpoint, self.is_transcoder)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `SAE.encode`."""
        return self._cache.get_sae(self._name).encode(x)

    def __call__(self, x: Tensor) -> Tensor:
        """Reconstruct, see `SAE.forward`."""
        reconstructed: Tensor = self._cache.get_sae(self._name)(x)
        return reconstructed


class SAECache(Mapping[str, CachedSAE]):
    """The SAEs of a folder by hookpoint; up to `max_bytes` of weights stay in memory, the others are read again.

    Eviction is most-recently-used first, which suits cyclic access over layers: early layers stay cached, and later
    ones share the remaining memory.

    Parameters
    ----------
    folder: folder with one folder per hookpoint. Every SAE is read once, so that a broken one is found early.
    hookpoints: names of the SAEs, in the order of the mapping.
    max_bytes: limit; one SAE is held even if it is larger. None: 4 GiB on a CPU, half of the free memory of a GPU.

    Raises
    ------
    UserError: a file is missing or corrupt, see `checkpoint.load`.
    """

    def __init__(
        self, folder: Path, hookpoints: Sequence[str], device: torch.device | None = None, max_bytes: int | None = None
    ) -> None:
        self.folder, self.device = folder, device or torch.device("cpu")
        if max_bytes is None:
            on_gpu = self.device.type == "cuda"
            max_bytes = int(torch.cuda.mem_get_info(self.device)[0]) // 2 if on_gpu else _MAX_BYTES
        self.max_bytes = max_bytes
        self._held: dict[str, SAE] = {}
        self._bytes: dict[str, int] = {}
        self._entries = {name: CachedSAE(self, name, self.get_sae(name)) for name in hookpoints}
        if len(self._held) < len(self._entries):
            self._held.clear()  # leave memory for the caller's next step, such as loading a model

    def get_sae(self, name: str) -> SAE:
        """The SAE itself, on `device`."""
        if name not in self._held:
            expected = self._bytes.get(name, max(self._bytes.values(), default=0))
            while self._held and sum(self._bytes[held] for held in self._held) + expected > self.max_bytes:
                self._held.popitem()
            sae = checkpoint.load(self.folder, name).to(self.device)
            copy = sae.encoder.nbytes // 2 if sae.is_screened else 0  # in bfloat16, which `encode` keeps
            self._bytes[name] = sum(t.nbytes for t in (*sae.parameters(), *sae.buffers())) + copy
            self._held[name] = sae
        return self._held[name]

    def __getitem__(self, name: str) -> CachedSAE:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
