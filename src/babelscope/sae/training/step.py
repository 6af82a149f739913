"""The training step of SAEs with a fixed number of active latents: TopK, BatchTopK, and either with nested widths.

The step keeps the active latents of every row only: nothing of size batch x latents outlives a chunk of rows. A matrix
product screens the latents (in bfloat16 if the hardware multiplies it faster), and exact float32 scores re-rank the
best and a few spare candidates. The hits are then sorted by latent, so that every gradient is a single pass over rows.
`sae.training.dense` has the step for the other activation functions.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from babelscope.models.matmul import linear
from babelscope.sae.autoencoder import SAE, chunk_rows
from babelscope.sae.kernels import fused
from babelscope.sae.kernels.dots import dots
from babelscope.sae.kernels.topk import top_k
from babelscope.sae.screening import screening_dtype

# Candidates beyond k that screening in bfloat16 passes to the exact re-ranking: with 8, the overlap with the exact top
# k is 1.000, with none 0.991.
_SPARE = 8
# Candidates per row in BatchTopK, in multiples of k; rows that may have more active latents are encoded again.
_WIDE = 3

Selection = Literal["topk", "batchtopk"]


class Step(NamedTuple):
    """The result of one training step.

    Attributes
    ----------
    loss: scalar, the mean of ||y_hat - y||^2 over rows (and over nested widths); differentiable.
    error: float32 [rows, d], y_hat - y (a constant).
    activity: float32 [n], the sum of every latent's activations; 0 if it did not fire.
    l0: scalar, mean number of active latents per row.
    min_activation: scalar, the smallest activation above 0 (infinite if there is none).
    """

    loss: Tensor
    error: Tensor
    activity: Tensor
    l0: Tensor
    min_activation: Tensor


def sparse_step(
    sae: SAE,
    x: Tensor,
    y: Tensor | None = None,
    *,
    select: Selection = "topk",
    widths: Sequence[int] = (),
    screen: torch.dtype | None = None,
) -> Step:
    """Forward pass whose `loss.backward()` gives the gradients of all four weights.

    Parameters
    ----------
    sae: SAE with float32 weights and a `k`.
    x: float32 [rows, d_in], rows >= 1; no gradient flows to it.
    y: float32 [rows, d], activations to reconstruct (transcoders); None: x.
    select: "topk" keeps the k largest positive scores of every row, "batchtopk" the rows * k largest of the batch
        (Bussmann et al. 2024, arXiv 2412.06410).
    widths: nested widths below n, ascending (Matryoshka SAEs, Bussmann et al. 2025, arXiv 2503.17547): the loss is the
        mean of the losses of the reconstructions by the first m latents, for every m of `widths` and for n.
    screen: dtype of the screening, bfloat16 or float32; None: `screening_dtype` of the device.

    Raises
    ------
    ValueError: the SAE has no `k`.
    """
    if sae.k is None:
        raise ValueError("the sparse step needs an SAE with k active latents")
    dtype = screen or screening_dtype(x.device)
    apply: Any = _Sparse.apply
    ends = torch.tensor([*widths, sae.latents], device=x.device) if widths else None
    weights = sae.encoder, sae.W_dec, sae.b_enc, sae.b_dec
    return Step(*apply(x, y, *weights, sae.b_in, sae.k, select, ends, dtype))


class _Sparse(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor | None,
        encoder: Tensor,
        W_dec: Tensor,
        b_enc: Tensor,
        b_dec: Tensor,
        b_in: Tensor | None,
        k: int,
        select: Selection,
        ends: Tensor | None,
        dtype: torch.dtype,
    ) -> tuple[Tensor, ...]:
        encoder, W_dec = encoder.detach(), W_dec.detach()  # else embedding_bag would save tensors for backward
        centred = x - (b_dec if b_in is None else b_in)
        target = centred if b_in is None and y is None else (x if y is None else y) - b_dec
        choose = _encode if select == "topk" else _batch_top_k
        active = _Active(*choose(centred, encoder, b_enc, k, dtype), ends)
        error = active.decode(W_dec).sub_(target.unsqueeze(1))
        hits = _Hits(active)
        activity = x.new_zeros(len(encoder)).index_add_(0, hits.latent, hits.value)
        ctx.save_for_backward(centred, encoder, W_dec, error)
        ctx.hits, ctx.tied = hits, b_in is None
        fires = active.value > 0
        l0 = fires.sum() / len(x)
        least = functional.pad(active.value.masked_fill(~fires, torch.inf), (0, 1), value=torch.inf).min()
        last = error[:, -1]
        ctx.mark_non_differentiable(last, activity, l0, least)
        ctx.set_materialize_grads(False)
        return error.square().sum(-1).sum() / (len(x) * error.shape[1]), last, activity, l0, least

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        centred, encoder, W_dec, error = ctx.saved_tensors
        hits: _Hits = ctx.hits
        rows, widths, _ = error.shape
        g = error * (grad * (2.0 / (rows * widths)))
        if widths > 1:  # a latent takes part in the reconstruction of its own width and of every larger one
            g = g.flip(1).cumsum(1).flip(1)
        g_b_dec = g[:, 0].sum(0)
        g_encoder, g_W_dec, g_b_enc = hits.gradients(W_dec, g.flatten(0, 1), centred)
        if ctx.tied:
            g_b_dec -= g_b_enc @ encoder  # b_dec is added to the output and subtracted from the input
        return None, None, g_encoder, g_W_dec, g_b_enc, g_b_dec, None, None, None, None, None


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
            # If too few scores are positive, one that rounding made negative may belong to the top k (CPU only).
            thin = None if centred.is_cuda else (value.amin(1) <= 0).nonzero().squeeze(1)
            value, index = _rerank(exact, encoder, b_enc, index, k)
            if thin is not None and len(thin):
                value[thin], index[thin] = top_k(torch.addmm(b_enc, exact[thin], encoder.T), k)
        values.append(value)
        indices.append(index)
    return (torch.cat(values), torch.cat(indices)) if len(values) > 1 else (values[0], indices[0])


def _rerank(centred: Tensor, encoder: Tensor, b_enc: Tensor, candidates: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of the candidate latents [rows, q] by their exact float32 scores."""
    kernels = fused(centred)
    if kernels and kernels.suits_rerank(candidates):
        best: tuple[Tensor, Tensor] = kernels.rerank(centred, encoder, b_enc, candidates, k)
        return best
    rows = torch.arange(len(centred), device=centred.device).repeat_interleave(candidates.shape[1])
    latents = candidates.view(-1)
    scores = dots(centred, encoder, rows, latents).add_(b_enc[latents]).view(candidates.shape)
    values, order = scores.topk(k, dim=-1, sorted=False)
    return values.relu_(), candidates.gather(1, order)


def _batch_top_k(centred: Tensor, encoder: Tensor, b_enc: Tensor, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The rows * k largest activations of the batch: values [rows, q], 0 if not kept, and indices [rows, q]."""
    rows, n = len(centred), len(encoder)
    wanted, wide = rows * k, min(n, _WIDE * k)
    values, indices = _encode(centred, encoder, b_enc, wide, dtype)
    while True:
        least = values.flatten().kthvalue(values.numel() - wanted + 1).values
        # All candidates of these rows are kept, so more of their activations may belong to the largest.
        smallest = values.amin(1)
        full = ((smallest >= least) & (smallest > 0)).nonzero().squeeze(1)
        if not len(full) or wide == n:
            return values.where(values >= least, 0.0), indices
        wide = min(n, 4 * wide)
        more, which = _encode(centred[full], encoder, b_enc, wide, torch.float32)
        grow = (0, wide - values.shape[1])
        values, indices = functional.pad(values, grow), functional.pad(indices, grow)
        values[full], indices[full] = more, which


class _Active:
    """The active latents of every row as flat lists of hits, in the order of their bags.

    A bag of hits is decoded together: it is a row or, with nested widths, a row's hits between two adjacent widths.

    Attributes
    ----------
    latent, value, bag: [hits].
    """

    def __init__(self, values: Tensor, indices: Tensor, ends: Tensor | None) -> None:
        self.rows, q = indices.shape
        self.widths = 1 if ends is None else len(ends)
        self.latent, self.value = indices.view(-1), values.view(-1)
        row = torch.arange(self.rows, device=indices.device).repeat_interleave(q)
        self.bag = row * self.widths
        self.first = torch.arange(0, self.rows * q, q, device=indices.device)
        # On a GPU, hits of value 0 cost less than the synchronisation to find them.
        if ends is None and (values.is_cuda or bool((self.value > 0).all())):
            return
        kept = (self.value > 0).nonzero().squeeze(1)
        bag = self.bag[kept]
        if ends is not None:
            bag += torch.bucketize(self.latent[kept], ends, right=True)
        self.bag, order = bag.sort(stable=True)
        self.latent, self.value = self.latent[kept][order], self.value[kept][order]
        counts = torch.bincount(self.bag, minlength=self.rows * self.widths)
        self.first = counts.cumsum(0).sub_(counts)

    def decode(self, W_dec: Tensor) -> Tensor:
        """Reconstructions by each nested width, [rows, widths, d]."""
        if kernels := fused(W_dec):
            flat = kernels.decode(W_dec, self.latent, self.value, self.first)
        else:
            flat = functional.embedding_bag(self.latent, W_dec, self.first, mode="sum", per_sample_weights=self.value)
        parts: Tensor = flat.view(self.rows, self.widths, -1)
        return parts.cumsum(1) if self.widths > 1 else parts


class _Hits:
    """The same hits in the order of their latents: after one sort per step, all gradients are passes over rows.

    Attributes
    ----------
    latent, value, row, bag: [hits].
    """

    def __init__(self, active: _Active) -> None:
        self.latent, order = active.latent.sort(stable=True)
        self.value, self.bag = active.value[order], active.bag[order]
        self.row = self.bag.div(active.widths, rounding_mode="floor") if active.widths > 1 else self.bag

    def gradients(self, W_dec: Tensor, g: Tensor, centred: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the encoder [n, d_in], of W_dec [n, d], and of b_enc [n].

        Parameters
        ----------
        g: [bags, d], gradient of the reconstructions.
        centred: [rows, d_in], the centred inputs.
        """
        if kernels := fused(W_dec):
            found: tuple[Tensor, Tensor, Tensor] = kernels.gradients(
                W_dec, g, centred, self.latent, self.value, self.row, self.bag
            )
            return found
        g_value = dots(W_dec, g, self.latent, self.bag).mul_(self.value > 0)
        counts = torch.bincount(self.latent, minlength=len(W_dec))
        first = counts.cumsum(0).sub_(counts)
        sums = [
            functional.embedding_bag(index, vectors, first, mode="sum", per_sample_weights=weight)
            for weight, vectors, index in ((g_value, centred, self.row), (self.value, g, self.bag))
        ]
        return sums[0], sums[1], self._total(g_value, first)

    def _total(self, weight: Tensor, first: Tensor) -> Tensor:
        """For every latent, the sum of its hits' weights: [n]."""
        if weight.is_cuda:  # on a GPU, bincount adds atomically, in a varying order
            one, zeros = weight.new_ones(1, 1), torch.zeros_like(self.row)
            return functional.embedding_bag(zeros, one, first, mode="sum", per_sample_weights=weight).squeeze(1)
        return torch.bincount(self.latent, weights=weight, minlength=len(first)).float()
