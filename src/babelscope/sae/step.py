"""The training step of a TopK SAE: the loss and its gradients, touching only the k active latents of every row.

Nothing of size batch x latents outlives a chunk of rows. Latents are screened by one matrix product (in bfloat16 where
the hardware multiplies it faster), and a few spare candidates are re-ranked by their exact float32 scores. The hits are
then sorted by latent once, which makes every gradient a single pass over rows.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from babelscope.matmul import linear
from babelscope.sae.autoencoder import SAE, chunk_rows
from babelscope.sae.topk import top_k

# Candidates beyond k that bfloat16 screening hands on to the exact re-ranking: with 8 the overlap with the exact top k
# is 1.000, with none 0.991.
_SPARE = 8


class Step(NamedTuple):
    """What one training step computed.

    Attributes
    ----------
    loss: scalar, the mean over rows of ||x_hat - x||^2; differentiable.
    error: float32 [rows, d], x_hat - x (a constant).
    values, indices: [rows, k] activations (constants).
    activity: float32 [n], the sum of every latent's activations; 0 = it did not fire.
    """

    loss: Tensor
    error: Tensor
    values: Tensor
    indices: Tensor
    activity: Tensor


def sparse_step(sae: SAE, x: Tensor, *, screen: torch.dtype | None = None) -> Step:
    """Forward pass whose `loss.backward()` gives the gradients of all four weights.

    Parameters
    ----------
    sae: float32 weights.
    x: float32 [rows, d], rows >= 1; no gradient flows to it.
    screen: precision of the screening, bfloat16 or float32; None takes what suits the device.
    """
    dtype = screen or screening_dtype(x.device)
    apply: Any = _Sparse.apply
    return Step(*apply(x, sae.encoder, sae.W_dec, sae.b_enc, sae.b_dec, sae.k, dtype))


def screening_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 where the device multiplies it in hardware, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    if device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return torch.bfloat16
    return torch.float32


class _Sparse(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, encoder: Tensor, W_dec: Tensor, b_enc: Tensor, b_dec: Tensor, k: int, dtype: torch.dtype
    ) -> tuple[Tensor, ...]:
        encoder, W_dec = encoder.detach(), W_dec.detach()  # embedding_bag keeps books for weights that need gradients
        centred = x - b_dec
        values, indices = _encode(centred, encoder, b_enc, k, dtype)
        error = functional.embedding_bag(indices, W_dec, per_sample_weights=values, mode="sum").sub_(centred)
        hits = _Hits(indices, len(encoder))
        by_latent = values.view(-1)[hits.order]
        activity = torch.bincount(hits.latent, weights=by_latent, minlength=len(encoder))
        ctx.save_for_backward(centred, encoder, W_dec, by_latent, error)
        ctx.hits = hits
        ctx.mark_non_differentiable(error, values, indices, activity)
        ctx.set_materialize_grads(False)
        return error.square().sum() / len(x), error, values, indices, activity

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        centred, encoder, W_dec, values, error = ctx.saved_tensors
        hits: _Hits = ctx.hits
        g = error * (grad * (2.0 / len(error)))
        g_values = hits.dot(W_dec, g).mul_(values > 0)
        g_b_enc = hits.total(g_values)
        g_b_dec = g.sum(0) - g_b_enc @ encoder  # b_dec is added to the output and taken off the input
        return None, hits.sum(g_values, centred), hits.sum(values, g), g_b_enc, g_b_dec, None, None


def _encode(centred: Tensor, encoder: Tensor, b_enc: Tensor, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Top-k activations: values float32 [rows, k] and indices [rows, k]."""
    rows, n = len(centred), len(encoder)
    spare = 0 if dtype == torch.float32 else min(_SPARE, n - k)
    size = chunk_rows(n, centred.device)
    buffer = torch.empty(min(size, rows), n, dtype=dtype, device=centred.device)
    narrow, weights, bias = centred.to(dtype), encoder.to(dtype), b_enc.to(dtype)
    values, indices = [], []
    for first in range(0, rows, size):
        chunk = narrow[first : first + size]
        if dtype == torch.float32:
            scores = linear(chunk, weights, bias)
        else:
            scores = torch.addmm(bias, chunk, weights.T, out=buffer[: len(chunk)])
        value, index = top_k(scores, k + spare)
        if dtype != torch.float32:
            exact = centred[first : first + size]
            # Where too few scores are positive, one that rounding has made negative may belong to the top k.
            thin = (value.amin(1) <= 0).nonzero().squeeze(1)
            value, index = _rerank(exact, encoder, b_enc, index, k)
            if len(thin):
                value[thin], index[thin] = top_k(torch.addmm(b_enc, exact[thin], encoder.T), k)
        values.append(value)
        indices.append(index)
    return torch.cat(values), torch.cat(indices)


def _rerank(centred: Tensor, encoder: Tensor, b_enc: Tensor, candidates: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of the candidate latents [rows, q] by their exact float32 scores."""
    rows = torch.arange(len(centred), device=centred.device).repeat_interleave(candidates.shape[1])
    latents = candidates.view(-1)
    scores = _dots(centred, encoder, rows, latents).add_(b_enc[latents]).view(candidates.shape)
    values, place = scores.topk(k, dim=-1, sorted=False)
    return values.relu_(), candidates.gather(1, place)


class _Hits:
    """The rows x k hits in the order of their latents: one sort a step, then all gradients are passes over rows."""

    def __init__(self, indices: Tensor, latents: int) -> None:
        self.latent, self.order = indices.view(-1).sort(stable=True)
        self.k = indices.shape[1]
        self.row = self.order.div(self.k, rounding_mode="floor")
        counts = torch.bincount(self.latent, minlength=latents)
        self.first = counts.cumsum(0).sub_(counts)

    def sum(self, weight: Tensor, rows: Tensor) -> Tensor:
        """For every latent the weighted sum of the rows that it fired on: [n, d]."""
        return functional.embedding_bag(self.row, rows, self.first, mode="sum", per_sample_weights=weight)

    def total(self, weight: Tensor) -> Tensor:
        """For every latent the sum of its hits' weights: [n]."""
        if weight.device.type == "cuda":  # bincount adds atomically there, in another order every time
            return self.sum(weight, weight.new_ones(len(self.row) // self.k, 1)).squeeze(1)
        return torch.bincount(self.latent, weights=weight, minlength=len(self.first)).float()

    def dot(self, latents: Tensor, rows: Tensor) -> Tensor:
        """For every hit the product of its latent's vector and its row: [hits]."""
        return _dots(latents, rows, self.latent, self.row)


def _dots(a: Tensor, b: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """`(a[i] * b[j]).sum(1)` without the gathered copies; quickest where `i` ascends (`a` then streams once)."""
    if a.device.type == "cpu":
        # The kernel behind embedding_bag's gradient for its weights is just this; "offsets" is unused in mode 0 (sum).
        dots: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(a, b, j, i, i, 0)
        return dots
    size = 2**18
    return torch.cat([(a[i[s : s + size]] * b[j[s : s + size]]).sum(1) for s in range(0, len(i), size)])
