"""The exact top k of wide dictionaries at the speed of a product in bfloat16.

A product in bfloat16 screens the latents: the k best and some spare ones are candidates, whose float32 scores decide.
An error bound proves for each row that no other latent belongs to its top k. If it cannot, all latents that the bound
leaves possible are compared, so that the result is always exact.

The bound. Let x and w be a row and a latent's weights in float32, x' and w' the same in the dtype of the product, and
u = 2^-23, a rounding or truncation of float32. Then (Cauchy-Schwarz; Higham 2002, Accuracy and Stability, section 3.1)

    |x.w - x'.w'| = |(x - x').w + x'.(w - w')| <= |x - x'| |w| + |x'| |w - w'|,

and a sum of d products and a bias, in any order, has an error of at most (d + 4) u (|x||w| + |b|). The latter holds
twice, for the product and for the float32 score. The product's last rounding is to bfloat16: 2^-8 of the result.
"""

import torch
from torch import Tensor

from babelscope.models import compat
from babelscope.models.matmul import linear
from babelscope.sae.kernels.dots import aligned, fixed_dots, has_fixed_dots
from babelscope.sae.kernels.topk import top_k

# Below this number of encoder weights, or of latents per active one, screening gains nothing (benchmarks/encode.py).
_WEIGHTS, _SPARSITY = 2**24, 256
# Candidates beyond k. Those that may be among the k best are compared, at least the first ones.
_SPARE, _FIRST = 64, 8
# With fewer rows, the conversion of the weights takes longer than bfloat16 saves.
MIN_ROWS = 256
# Unit of rounding of float32 (doubled, for hardware that truncates), and the product's last rounding by its dtype.
_UNIT = 2.0**-23
_LAST = {torch.bfloat16: 2.0**-8, torch.float32: 0.0}
# Products of subnormal numbers may be flushed to 0; above the larger number, sums could overflow.
_TINY, _HUGE = 1e-30, 1e37
_INDEX = 2**32 - 1


def screening_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 if the device multiplies it in hardware, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    if device.type == "cpu" and compat.multiplies_bfloat16():
        return torch.bfloat16
    return torch.float32


def suits(encoder: Tensor, k: int) -> bool:
    """Whether a dictionary is encoded by `ExactTopK`: it depends on the shape alone, not on the speed of the machine.

    It is, from 2^24 encoder weights and 256 latents per active latent on (and if the kernels exist that give the same
    bits for a pair of rows whatever the others are). Smaller ones are faster by a single float32 product.
    """
    n = len(encoder)
    return encoder.numel() >= _WEIGHTS and n >= _SPARSITY * k and n % 16 == 0 and has_fixed_dots(encoder)


class ExactTopK:
    """The k largest positive scores of a row, by (score, then lowest index), the same bits for every screening dtype.

    A score is `fixed_dots(x, w) + b` in float32, whichever product screens.

    Parameters
    ----------
    encoder: float32 [n, d]; see `suits`.
    b_enc: float32 [n].
    k: number per row.
    dtype: of the product that screens, bfloat16 or float32.

    Attributes
    ----------
    redone: number of rows so far in which the candidates were not enough.
    """

    def __init__(self, encoder: Tensor, b_enc: Tensor, k: int, dtype: torch.dtype) -> None:
        self.encoder, self.b_enc, self.k, self.dtype = aligned(encoder.detach()), b_enc.detach(), k, dtype
        self.redone = 0
        self._source = encoder  # its memory must not become that of other weights: `SAE` compares addresses
        self._weights, self._norm, self._error = self.encoder, 0.0, 0.0
        if self.dtype != torch.float32:
            self._weights = torch.empty_like(self.encoder, dtype=self.dtype)
        for wide, low in zip(torch.split(self.encoder, 1024), torch.split(self._weights, 1024), strict=True):
            self._norm = max(self._norm, float(_norms(wide).max()))
            if low.dtype != torch.float32:
                low.copy_(wide)
                self._error = max(self._error, float(_norms(wide - low.float()).max()))
        self._bias = self.b_enc.to(self.dtype)
        self._bias_error = float((self.b_enc - self._bias.float()).abs().max())
        self._bias_size = float(self.b_enc.abs().max())
        self._buffer = torch.empty(0, dtype=self.dtype, device=encoder.device)

    def __call__(self, centred: Tensor) -> tuple[Tensor, Tensor]:
        """Encode a chunk of rows, as large as `chunk_rows` allows.

        Parameters
        ----------
        centred: float32 [rows, d], finite.

        Returns
        -------
        values: float32 [rows, k] >= 0, descending.
        indices: int64 [rows, k]; ignore those of the value 0.
        """
        centred = aligned(centred)
        scores, bound = self._screen(centred)
        screened, candidates = _candidates(scores, self.k)
        highest = self._highest(screened, bound)
        # The first few candidates give a lower bound of the k-th score; most others cannot reach it.
        first = min(self.k + _FIRST, candidates.shape[1])
        wanted = torch.zeros_like(candidates, dtype=torch.bool)
        wanted[:, :first] = True
        exact = torch.full(candidates.shape, -torch.inf, device=centred.device)
        exact[:, :first] = self._exact(centred, candidates, wanted).view(-1, first)
        least = exact[:, :first].topk(self.k, dim=1).values[:, -1:].relu()
        wanted = self._possible(highest, least)
        wanted[:, :first] = False
        exact[wanted] = self._exact(centred, candidates, wanted)
        values, indices = _best(exact, candidates, self.k)
        # No other latent's screened score is larger than that of the last candidate, or than 0.
        others = self._highest(screened[:, -1:].clamp(min=0), bound)
        unsure = self._possible(others, values[:, -1:]).squeeze(1).nonzero().squeeze(1)
        if len(unsure):
            self.redone += len(unsure)
            possible = self._possible(self._highest(scores[unsure], bound[unsure]), values[unsure, -1:])
            values[unsure], indices[unsure] = self._compare(centred, unsure, possible)
        return values, indices

    def _screen(self, centred: Tensor) -> tuple[Tensor, Tensor]:
        """Scores [rows, n] in `dtype`, and the bound of their errors before the last rounding, float64 [rows, 1]."""
        low = centred.to(self.dtype)
        if self.dtype == torch.float32:
            scores = linear(low, self._weights, self._bias)
        else:
            if len(self._buffer) != len(low):
                self._buffer = torch.empty(len(low), len(self._weights), dtype=self.dtype, device=low.device)
            with _float32_sums(low):
                scores = torch.addmm(self._bias, low, self._weights.T, out=self._buffer)
        size, narrow, error = _norms(centred), _norms(low.float()), _norms(centred - low.float())
        reach = torch.maximum(size, narrow) * (self._norm + self._error) + self._bias_size
        bound = error * self._norm + narrow * self._error + self._bias_error
        bound += 2 * (centred.shape[1] + 4) * _UNIT * reach + _TINY * (1 + reach)
        return scores, bound.where(reach < _HUGE, torch.inf).mul_(1 + 2.0**-20).unsqueeze(1)

    def _highest(self, scores: Tensor, bound: Tensor) -> Tensor:
        """An upper bound of the float32 scores, float64 [rows, q], if these are not above the screened `scores`."""
        wide = scores.double()
        return wide + wide.abs().mul_(2 * _LAST[self.dtype]).add_(bound)

    @staticmethod
    def _possible(highest: Tensor, least: Tensor) -> Tensor:
        """Whether scores of at most `highest` may be above 0 and as large as `least`; true if a bound is no number."""
        return ~((highest < least) | (highest <= 0))

    def _exact(self, centred: Tensor, latents: Tensor, wanted: Tensor) -> Tensor:
        """The float32 scores of the `wanted` [rows, q] of the `latents` [rows, q], row after row."""
        row, latent = wanted.nonzero(as_tuple=True)[0], latents[wanted]
        return fixed_dots(centred, self.encoder, row, latent).add_(self.b_enc[latent])

    def _compare(self, centred: Tensor, rows: Tensor, possible: Tensor) -> tuple[Tensor, Tensor]:
        """The top k of some `rows` from all `possible` latents, bool [len(rows), n]."""
        number, latent = possible.nonzero(as_tuple=True)
        # Indexing `centred` would copy rows to places of another alignment.
        exact = fixed_dots(centred, self.encoder, rows[number], latent).add_(self.b_enc[latent])
        count = possible.sum(1)
        column = torch.arange(len(number), device=number.device) - (count.cumsum(0) - count)[number]
        width = max(self.k, int(count.max()))
        values, indices = exact.new_zeros(len(rows), width), latent.new_zeros(len(rows), width)
        values[number, column], indices[number, column] = exact, latent
        return _best(values, indices, self.k)


def _candidates(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best latents of every row and some spare ones, descending: screened scores and indices [rows, q].

    The last score, or 0 if that is larger, is at least as large as the scores of all other latents.
    """
    n = scores.shape[1]
    _, indices = top_k(scores, max(k, min(k + _SPARE, n // 32)))
    screened, order = scores.gather(1, indices).sort(1, descending=True)
    return screened, indices.gather(1, order)


def _norms(rows: Tensor) -> Tensor:
    """Euclidean norms in float64, whose rounding the factor at the end of the bound covers."""
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    return norms


def _best(values: Tensor, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of relu(`values`), descending; of equal ones, those of the lowest indices.

    One integer holds a value's bits above its index (positive floats have the order of their bits).
    """
    bits = values.relu().add_(0.0).view(torch.int32).long()  # + 0.0: no negative zero
    keys = bits.bitwise_left_shift_(32).bitwise_or_(_INDEX - indices).topk(k, dim=1).values
    return keys.bitwise_right_shift(32).int().view(torch.float32), _INDEX - keys.bitwise_and(_INDEX)


class _float32_sums:  # noqa: N801
    """On a GPU, products in bfloat16 that add in float32 only."""

    def __init__(self, x: Tensor) -> None:
        self.is_cuda = x.is_cuda

    def __enter__(self) -> None:
        if self.is_cuda:
            self.before = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False

    def __exit__(self, *_: object) -> None:
        if self.is_cuda:
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = self.before
