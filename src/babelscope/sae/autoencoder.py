"""The TopK sparse autoencoder: its weights, what it encodes and how it decodes."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from babelscope.matmul import linear
from babelscope.sae.topk import top_k

# Scores in one chunk of `encode`: bounds its memory (float32 bytes: 4 times as many).
# On a CPU the chunk is to stay in the last-level cache between the product and the top-k.
_CHUNK = {"cpu": 2**22, "cuda": 2**28}


def chunk_rows(latents: int, device: torch.device) -> int:
    """How many rows of `latents` scores are worked on at once on this device (a power of two suits the product)."""
    most = max(16, _CHUNK.get(device.type, 2**26) // latents)
    return 1 << (most.bit_length() - 1)


class SAE(nn.Module):
    """TopK sparse autoencoder (Gao et al. 2024, arXiv 2406.04093, eq. 3, with the decoder's bias taken off the input).

    `z = TopK(relu((x - b_dec) @ W_enc + b_enc))`, `x_hat = z @ W_dec + b_dec`.

    Parameters
    ----------
    encoder: float32 [n, d], one row per latent (the transpose of `W_enc`: a latent's weights lie together in memory).
    W_dec: float32 [n, d].
    b_enc: float32 [n].
    b_dec: float32 [d].
    k: active latents per row.

    Attributes
    ----------
    W_enc: [d, n], a view of `encoder` in the layout of SAELens.
    """

    def __init__(self, encoder: Tensor, W_dec: Tensor, b_enc: Tensor, b_dec: Tensor, k: int) -> None:
        super().__init__()
        n, d = encoder.shape
        if W_dec.shape != (n, d) or b_enc.shape != (n,) or b_dec.shape != (d,) or not 0 < k <= n:
            shapes = ", ".join(str(tuple(t.shape)) for t in (encoder, W_dec, b_enc, b_dec))
            raise ValueError(f"an SAE needs [n, d], [n, d], [n], [d] and 0 < k <= n, got {shapes} and k = {k}")
        self.encoder = nn.Parameter(encoder.float().contiguous())
        self.W_dec = nn.Parameter(W_dec.float().contiguous())
        self.b_enc = nn.Parameter(b_enc.float().contiguous())
        self.b_dec = nn.Parameter(b_dec.float().contiguous())
        self.k = k

    @property
    def W_enc(self) -> Tensor:
        """Encoder weights [d, n]: a transposed view of `encoder`."""
        return self.encoder.T

    @property
    def latents(self) -> int:
        """Width n of the dictionary."""
        return self.encoder.shape[0]

    @property
    def d(self) -> int:
        """Width d of the activations."""
        return self.encoder.shape[1]

    @torch.no_grad()
    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Exact TopK activations, without gradients (training has its own step, `babelscope.sae.step`).

        Parameters
        ----------
        x: [..., d], any floating dtype; computed in float32, in chunks of rows, so that memory stays bounded.

        Returns
        -------
        values: float32 [..., k] >= 0, in no particular order.
        indices: int64 [..., k], distinct within a row. Where a value is 0 the latent does not fire: ignore its index.
        """
        rows = x.reshape(-1, self.d)
        values = torch.empty(len(rows), self.k, device=x.device)
        indices = torch.empty(len(rows), self.k, dtype=torch.int64, device=x.device)
        size = chunk_rows(self.latents, x.device)
        for first in range(0, len(rows), size):
            centred = rows[first : first + size].float() - self.b_dec
            scores = linear(centred, self.encoder, self.b_enc)
            values[first : first + size], indices[first : first + size] = top_k(scores, self.k)
        return values.view(*x.shape[:-1], self.k), indices.view(*x.shape[:-1], self.k)

    def decode(self, values: Tensor, indices: Tensor) -> Tensor:
        """Reconstruct activations, float32 [..., d], from `values` [..., k] and `indices` [..., k] (any k)."""
        k = values.shape[-1]
        flat = functional.embedding_bag(
            indices.reshape(-1, k), self.W_dec, per_sample_weights=values.reshape(-1, k), mode="sum"
        )
        return (flat + self.b_dec).view(*values.shape[:-1], self.d)

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruct `x`: [..., d] -> float32 [..., d]."""
        return self.decode(*self.encode(x))


def initialise(mean: Tensor, latents: int, k: int, *, encoder_scale: float, seed: int) -> SAE:
    """Return an untrained SAE: random unit decoder rows, encoder rows along them, biases at 0 and `mean`.

    Parameters
    ----------
    mean: [d], mean of the (normalised) training data. A decoder bias of 0 instead costs many dead latents.
    latents, k: width of the dictionary and active latents.
    encoder_scale: norm of an encoder row; the decoder's transpose (1.0) overshoots with many latents per token.
    seed: of the directions.
    """
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(latents, len(mean), generator=generator)
    directions /= directions.norm(dim=1, keepdim=True)
    return SAE(directions * encoder_scale, directions, torch.zeros(latents), mean.clone(), k)
