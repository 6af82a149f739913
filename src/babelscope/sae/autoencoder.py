"""The sparse autoencoder: its weights, encoding and decoding."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from babelscope.models.matmul import linear
from babelscope.models.names import input_name
from babelscope.sae.kernels.topk import top_k
from babelscope.sae.screening import MIN_ROWS, ExactTopK, screening_dtype, suits

# Scores in one chunk of `encode`, of 4 bytes each, which bound its memory. On a CPU, the chunk must stay in the
# last-level cache between the product and the top-k.
_CHUNK = {"cpu": 2**22, "cuda": 2**28}


def chunk_rows(latents: int, device: torch.device) -> int:
    """The number of rows in a chunk on this device; a power of two, which suits the product."""
    most = max(16, _CHUNK.get(device.type, 2**26) // latents)
    return 1 << (most.bit_length() - 1)


class SAE(nn.Module):
    """A sparse autoencoder, or a transcoder: `z = f((x - b_in) @ W_enc + b_enc)`, `y_hat = z @ W_dec + b_dec`.

    A transcoder may have a skip connection (Paulo et al. 2025, arXiv 2501.18823), which adds `x @ W_skip^T` to `y_hat`.

    There are two activation functions f. TopK keeps the k largest positive scores of a row (Gao et al. 2024, arXiv
    2406.04093, eq. 3). JumpReLU keeps the positive scores above a threshold per latent (Rajamanoharan et al. 2024,
    arXiv 2407.14435, eq. 3). BatchTopK after training is JumpReLU with one threshold for all (Bussmann et al. 2024,
    arXiv 2412.06410, eq. 5); ReLU is JumpReLU with thresholds of 0.

    Parameters
    ----------
    encoder: float32 [n, d_in], the transpose of `W_enc`, so that a latent's weights are contiguous in memory.
    W_dec: float32 [n, d].
    b_enc: float32 [n].
    b_dec: float32 [d].
    k: active latents per row (TopK); None if `threshold` is given.
    threshold: float32 [n], >= 0 (JumpReLU); None if `k` is given.
    b_in: float32 [d_in], constant subtracted from a transcoder's input; None: an autoencoder, which subtracts `b_dec`.
    W_skip: float32 [d, d_in], skip connection of a transcoder, or None.

    Attributes
    ----------
    W_enc: [d_in, n], a view of `encoder` in the layout of SAELens.

    Raises
    ------
    ValueError: the shapes do not match, or not exactly one of `k` and `threshold` is given.
    """

    threshold: Tensor | None
    b_in: Tensor | None
    W_skip: Tensor | None

    def __init__(
        self,
        encoder: Tensor,
        W_dec: Tensor,
        b_enc: Tensor,
        b_dec: Tensor,
        k: int | None = None,
        *,
        threshold: Tensor | None = None,
        b_in: Tensor | None = None,
        W_skip: Tensor | None = None,
    ) -> None:
        super().__init__()
        (n, d_in), d = encoder.shape, W_dec.shape[-1]
        width = d_in if b_in is not None else d
        if W_dec.shape != (n, d) or b_enc.shape != (n,) or b_dec.shape != (d,) or width != d_in:
            shapes = ", ".join(str(tuple(t.shape)) for t in (encoder, W_dec, b_enc, b_dec))
            raise ValueError(f"an SAE needs [n, d_in], [n, d], [n], [d], and b_in if d_in is not d; got {shapes}")
        if b_in is not None and b_in.shape != (d_in,):
            raise ValueError(f"b_in needs the shape {(d_in,)}, got {tuple(b_in.shape)}")
        if W_skip is not None and (b_in is None or W_skip.shape != (d, d_in)):
            raise ValueError(f"W_skip needs a transcoder and the shape {(d, d_in)}, got {tuple(W_skip.shape)}")
        if (k is None) == (threshold is None):
            raise ValueError("an SAE needs either k (TopK) or a threshold (JumpReLU)")
        if k is not None and not 0 < k <= n:
            raise ValueError(f"an SAE of {n} latents needs 0 < k <= {n}, got k = {k}")
        if threshold is not None and (threshold.shape != (n,) or bool((threshold < 0).any())):
            raise ValueError(f"an SAE of {n} latents needs {n} thresholds >= 0")
        self.encoder = nn.Parameter(encoder.float().contiguous())
        self.W_dec = nn.Parameter(W_dec.float().contiguous())
        self.b_enc = nn.Parameter(b_enc.float().contiguous())
        self.b_dec = nn.Parameter(b_dec.float().contiguous())
        self.k = k
        self.register_buffer("threshold", None if threshold is None else threshold.float().contiguous())
        self.register_buffer("b_in", None if b_in is None else b_in.float().contiguous())
        self.register_buffer("W_skip", None if W_skip is None else W_skip.float().contiguous())
        self._screens: dict[torch.dtype, ExactTopK] = {}
        self._screens_key: list[object] = []

    @property
    def is_transcoder(self) -> bool:
        """Whether it encodes the input of the hookpoint's module instead of its output."""
        return self.b_in is not None

    def input_name(self, hookpoint: str) -> str:
        """The name of the activations that it encodes at `hookpoint`."""
        return input_name(hookpoint, self.is_transcoder)

    @property
    def W_enc(self) -> Tensor:
        """Encoder weights [d_in, n]: a transposed view of `encoder`."""
        return self.encoder.T

    @property
    def latents(self) -> int:
        """Width n of the dictionary."""
        return self.encoder.shape[0]

    @property
    def d_in(self) -> int:
        """Width of the input."""
        return self.encoder.shape[1]

    @property
    def d(self) -> int:
        """Width of the output; it differs from `d_in` in transcoders only."""
        return self.W_dec.shape[1]

    def centre(self, x: Tensor) -> Tensor:
        """`x - b_in` in float32, the encoder's input (an autoencoder's `b_in` is `b_dec`)."""
        return x.float() - (self.b_dec if self.b_in is None else self.b_in)

    @torch.no_grad()
    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Compute exact activations, without gradients (`sae.training` has steps with gradients).

        Parameters
        ----------
        x: [..., d_in], any floating dtype; it is encoded in float32, in chunks of rows to bound the memory. A wide TopK
            SAE screens the latents by a product in bfloat16, with the same result (`sae.screening`), and keeps a copy
            of its encoder in bfloat16.

        Returns
        -------
        values: float32 [..., q] >= 0, in no particular order; q is k or, for JumpReLU, the largest L0 of a row.
        indices: int64 [..., q], distinct within a row if the value is not 0. A value of 0 means that the latent does
            not fire; ignore its index.
        """
        rows = x.reshape(-1, self.d_in)
        size = chunk_rows(self.latents, x.device)
        encode = self._screen(len(rows)) if self.is_screened and len(rows) else self._encode
        parts = [encode(self.centre(rows[first : first + size])) for first in range(0, max(1, len(rows)), size)]
        most = max(part[0].shape[1] for part in parts)
        values, indices = (
            torch.cat([functional.pad(part[i], (0, most - part[i].shape[1])) for part in parts]) for i in (0, 1)
        )
        return values.view(*x.shape[:-1], most), indices.view(*x.shape[:-1], most)

    @property
    def is_screened(self) -> bool:
        """Whether `encode` screens the latents by a product in bfloat16, see `sae.screening`."""
        return self.k is not None and suits(self.encoder, self.k)

    def _screen(self, rows: int) -> ExactTopK:
        """A top k made for the present weights; few rows use one in bfloat16 only if it is already there."""
        assert self.k is not None
        weights = (self.encoder, self.b_enc)
        key = [self.k, *((w.data_ptr(), w._version) for w in weights if not w.is_inference())]
        if key != self._screens_key or any(w.is_inference() for w in weights):  # those do not count their changes
            self._screens, self._screens_key = {}, key
        wide, fast = torch.float32, screening_dtype(self.encoder.device)
        dtype = fast if rows >= MIN_ROWS or fast in self._screens else wide
        if dtype not in self._screens:
            self._screens[dtype] = ExactTopK(self.encoder, self.b_enc, self.k, dtype)
        return self._screens[dtype]

    def _encode(self, centred: Tensor) -> tuple[Tensor, Tensor]:
        scores = linear(centred, self.encoder, self.b_enc)
        if self.threshold is not None:
            return _above(scores, self.threshold)
        assert self.k is not None
        return top_k(scores, self.k)

    def decode(self, values: Tensor, indices: Tensor) -> Tensor:
        """The sum of the latents' contributions and `b_dec`, float32 [..., d], from `values`, `indices` [..., q]."""
        q = values.shape[-1]
        flat = functional.embedding_bag(
            indices.reshape(-1, q), self.W_dec, per_sample_weights=values.reshape(-1, q), mode="sum"
        )
        return (flat + self.b_dec).view(*values.shape[:-1], self.d)

    def reconstruct(self, x: Tensor, values: Tensor, indices: Tensor) -> Tensor:
        """The output [..., d] in float32 for an input `x` [..., d_in] and its activations (see `encode`)."""
        y = self.decode(values, indices)
        return y if self.W_skip is None else y + linear(x.float(), self.W_skip)

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruct: [..., d_in] -> float32 [..., d]."""
        return self.reconstruct(x, *self.encode(x))


def _above(scores: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """The positive scores above the threshold, [rows, q], padded with 0; q >= 1 is their largest number in a row."""
    active = (scores > threshold) & (scores > 0)
    row, latent = active.nonzero(as_tuple=True)
    count = active.sum(1)
    column = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
    values = scores.new_zeros(len(scores), max(1, int(count.max()) if len(count) else 0))
    indices = torch.zeros_like(values, dtype=torch.int64)
    values[row, column], indices[row, column] = scores[row, latent], latent
    return values, indices


def initialise(
    mean: Tensor, latents: int, k: int, *, encoder_scale: float, seed: int, b_in: Tensor | None = None
) -> SAE:
    """Return an untrained SAE with random unit decoder rows, parallel encoder rows, and the decoder bias `mean`.

    Parameters
    ----------
    mean: [d], mean of the (normalised) training data; with a decoder bias of 0 instead, many latents would die.
    latents, k: width of the dictionary, and active latents per row.
    encoder_scale: norm of an encoder row; with 1.0, many active latents per token overshoot.
    b_in: [d_in], mean of a transcoder's input; a transcoder's encoder rows have directions of their own.
    """
    generator = torch.Generator().manual_seed(seed)
    decoder = functional.normalize(torch.randn(latents, len(mean), generator=generator))
    encoder = decoder if b_in is None else functional.normalize(torch.randn(latents, len(b_in), generator=generator))
    return SAE(encoder * encoder_scale, decoder, torch.zeros(latents), mean.clone(), k, b_in=b_in)
