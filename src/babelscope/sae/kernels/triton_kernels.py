"""The training step's kernels for CUDA devices, in Triton, for operations that PyTorch does in many or serial passes.

The docstring of each kernel names its counterpart in PyTorch operations, which the CPU path uses. The kernels add in a
fixed order, so that the same inputs give the same bits.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Hits of a latent that one program adds up; several programs share the hits of a latent with more.
_SEGMENT = 64
# Maximum numbers in a program's block in registers.
_BLOCK = 2**13
# Maximum candidates per row in `rerank`.
_CANDIDATES = 128


def _warps(block: int) -> int:
    return min(16, max(1, block // 512))


def _group(n: int) -> int:
    """Scores in a group of `top_k`, such that with k = 32 there are about as many groups as members to compare."""
    power: int = triton.next_power_of_2(int((n / 32) ** 0.5))
    return min(128, max(8, power))


def suits_top_k(scores: Tensor, k: int) -> bool:
    """Whether `top_k` supports them: bfloat16 or float32, over k groups, and groups and members fit into a block."""
    n = scores.shape[1]
    groups = triton.cdiv(n, _group(n))
    fits = k < groups <= _BLOCK and n >= k * _group(n) and triton.next_power_of_2(k) * _group(n) <= _BLOCK
    return fits and scores.dtype in (torch.bfloat16, torch.float32) and scores.is_contiguous() and len(scores) > 0


def top_k(scores: Tensor, k: int) -> Tensor:
    """Positions of the k largest scores of every row, negative ones included, int64 [rows, k] (as `topk.top_k`).

    The k groups with the largest maxima contain the k largest scores. One pass over the scores finds the maxima, then
    one selection finds the groups and another their members.

    Parameters
    ----------
    scores: bfloat16 or float32 [rows, n]; see `suits_top_k`.
    """
    rows, n = scores.shape
    group = _group(n)
    groups = triton.cdiv(n, group)
    size = 8 * scores.element_size()
    bits = scores.view(torch.int16 if size == 16 else torch.int32)
    maxima = torch.empty(rows, groups, dtype=torch.int32, device=scores.device)
    chosen, indices = (torch.empty(rows, k, dtype=torch.int64, device=scores.device) for _ in range(2))
    tile = max(1, min(triton.next_power_of_2(groups), _BLOCK // group))
    options: dict[str, Any] = {"GROUP": group, "SIZE": size}
    _maxima[(rows, triton.cdiv(groups, tile))](bits, maxima, n, groups, TILE=tile, num_warps=8, **options)
    block = triton.next_power_of_2(groups)
    _largest_groups[(rows,)](maxima, chosen, groups, k, BLOCK=block, SIZE=size, num_warps=max(1, block // 1024))
    block = triton.next_power_of_2(k) * group
    _largest_members[(rows,)](bits, chosen, indices, n, k, BLOCK=block, num_warps=max(1, block // 1024), **options)
    return indices


@triton.jit
def _ordered(bits, SIZE: tl.constexpr):
    """The bits of floats as uint32 in the order of the floats."""
    wide = bits.to(tl.int32)
    wide = wide ^ ((wide >> 31) & ((1 << (SIZE - 1)) - 1))
    return wide.to(tl.uint32, bitcast=True) + tl.full([], 1 << (SIZE - 1), tl.uint32)


@triton.jit
def _select(key, k, SIZE: tl.constexpr):
    """Mask of the k largest of `key`, and a number below k for each; bisection over bits finds the k-th largest."""
    threshold = tl.full([], 0, dtype=tl.uint32)
    for bit in tl.static_range(SIZE):
        higher = threshold | tl.full([], 1 << (SIZE - 1 - bit), tl.uint32)
        enough = tl.sum((key >= higher).to(tl.int32), 0) >= k
        threshold = tl.where(enough, higher, threshold)
    above, equal = key > threshold, key == threshold
    # One scan for both running counts.
    count = tl.cumsum((above.to(tl.int32) << 16) + equal.to(tl.int32), 0)
    number = tl.where(above, (count >> 16) - 1, tl.sum(above.to(tl.int32), 0) + (count & 0xFFFF) - 1)
    return above | (equal & (number < k)), number


@triton.jit
def _maxima(bits, maxima, n, groups, GROUP: tl.constexpr, TILE: tl.constexpr, SIZE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * TILE + tl.arange(0, TILE)
    index = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    key = _ordered(tl.load(bits + row * n + index, mask=index < n, other=0), SIZE)
    largest = tl.max(tl.where(index < n, key, 0), 1)
    tl.store(maxima + row * groups + group, largest.to(tl.int32, bitcast=True), mask=group < groups)


@triton.jit
def _largest_groups(maxima, chosen, groups, k, BLOCK: tl.constexpr, SIZE: tl.constexpr):
    row, group = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    key = tl.load(maxima + row * groups + group, mask=group < groups, other=0).to(tl.uint32, bitcast=True)
    kept, number = _select(key, k, SIZE)
    tl.store(chosen + row * k + number, group.to(tl.int64), mask=kept)


@triton.jit
def _largest_members(bits, chosen, indices, n, k, BLOCK: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr):
    row, member = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = member < k * GROUP
    index = tl.load(chosen + row * k + member // GROUP, mask=inside, other=0) * GROUP + member % GROUP
    inside = inside & (index < n)
    key = _ordered(tl.load(bits + row * n + index, mask=inside, other=0), SIZE)
    kept, number = _select(tl.where(inside, key, 0), k, SIZE)
    tl.store(indices + row * k + number, index, mask=kept)


def suits_rerank(candidates: Tensor) -> bool:
    """Whether `rerank` supports them."""
    return candidates.shape[1] <= _CANDIDATES and len(candidates) > 0


def rerank(centred: Tensor, encoder: Tensor, b_enc: Tensor, candidates: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best candidates by exact float32 scores, descending: values >= 0 and indices (as `step._rerank`).

    Parameters
    ----------
    centred, encoder, b_enc: float32 [rows, d], [n, d], [n].
    candidates: int64 [rows, q]; see `suits_rerank`.
    """
    rows, q = candidates.shape
    values = torch.empty(rows, k, device=centred.device)
    indices = torch.empty(rows, k, dtype=torch.int64, device=centred.device)
    block = max(16, triton.next_power_of_2(q))
    _rerank[(rows,)](
        centred, encoder, b_enc, candidates, values, indices, q, k,
        D=centred.shape[1], CANDIDATES=block, BLOCK=_BLOCK // block, num_warps=4,
    )  # fmt: skip
    return values, indices


@triton.jit
def _rerank(
    centred, encoder, b_enc, candidates, values, indices, q, k,
    D: tl.constexpr, CANDIDATES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, number = tl.program_id(0).to(tl.int64), tl.arange(0, CANDIDATES)
    inside = number < q
    latent = tl.load(candidates + row * q + number, mask=inside, other=0)
    total = tl.zeros([CANDIDATES, BLOCK], dtype=tl.float32)
    for start in range(0, D, BLOCK):
        d = start + tl.arange(0, BLOCK)
        x = tl.load(centred + row * D + d, mask=d < D, other=0.0)
        mask = inside[:, None] & (d < D)[None, :]
        total += tl.load(encoder + latent[:, None] * D + d[None, :], mask=mask, other=0.0) * x[None, :]
    score = tl.sum(total, 1) + tl.load(b_enc + latent, mask=inside, other=0.0)
    score = tl.where(inside, score, float("-inf"))
    # A score's rank is the number of scores before it.
    other = tl.trans(tl.broadcast_to(score[:, None], (CANDIDATES, CANDIDATES)))
    earlier = tl.trans(tl.broadcast_to(number[:, None], (CANDIDATES, CANDIDATES))) < number[:, None]
    before = (other > score[:, None]) | ((other == score[:, None]) & earlier)
    rank = tl.sum(before.to(tl.int32), 1)
    tl.store(values + row * k + rank, tl.maximum(score, 0.0), mask=inside & (rank < k))
    tl.store(indices + row * k + rank, latent, mask=inside & (rank < k))


def dots(a: Tensor, b: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """For every pair, `(a[i] * b[j]).sum()`: float32 [pairs]; its bits depend on the two rows only (as `dots.dots`).

    Parameters
    ----------
    a, b: float32 [rows, d], [n, d].
    i, j: int64 [pairs].
    """
    out = torch.empty(len(i), device=a.device)
    if len(i):
        _dots[(triton.cdiv(len(i), 8),)](a, b, i, j, out, len(i), D=a.shape[1], PAIRS=8, BLOCK=256, num_warps=4)
    return out


@triton.jit
def _dots(a, b, i, j, out, pairs, D: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr):
    pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    inside = pair < pairs
    left = tl.load(i + pair, mask=inside, other=0)[:, None] * D
    right = tl.load(j + pair, mask=inside, other=0)[:, None] * D
    total = tl.zeros([PAIRS, BLOCK], dtype=tl.float32)
    for start in range(0, D, BLOCK):
        d = (start + tl.arange(0, BLOCK))[None, :]
        mask = inside[:, None] & (d < D)
        total += tl.load(a + left + d, mask=mask, other=0.0) * tl.load(b + right + d, mask=mask, other=0.0)
    tl.store(out + pair, tl.sum(total, 1), mask=inside)


def decode(W_dec: Tensor, latent: Tensor, value: Tensor, first: Tensor) -> Tensor:
    """For every bag, the sum of its hits' `value * W_dec[latent]`: float32 [bags, d] (as `embedding_bag`).

    Parameters
    ----------
    latent, value: int64 and float32 [hits], in the order of their bags.
    first: int64 [bags], index of each bag's first hit.
    """
    d = W_dec.shape[1]
    out = torch.empty(len(first), d, device=value.device)
    block = min(512, triton.next_power_of_2(d))
    if len(first):
        _decode[(len(first), triton.cdiv(d, block))](
            W_dec, latent, value, first, out, len(first), len(value), D=d, BLOCK=block, HITS=8, num_warps=4
        )
    return out


@triton.jit
def _decode(W_dec, latent, value, first, out, bags, hits, D: tl.constexpr, BLOCK: tl.constexpr, HITS: tl.constexpr):
    bag = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    start = tl.load(first + bag)
    stop = tl.load(first + bag + 1, mask=bag + 1 < bags, other=hits)
    total = tl.zeros([HITS, BLOCK], dtype=tl.float32)
    for begin in range(start, stop, HITS):
        hit = begin + tl.arange(0, HITS)
        unit = tl.load(latent + hit, mask=hit < stop, other=0)
        weight = tl.load(value + hit, mask=hit < stop, other=0.0)
        mask = (hit < stop)[:, None] & (d < D)[None, :]
        total += weight[:, None] * tl.load(W_dec + unit[:, None] * D + d[None, :], mask=mask, other=0.0)
    tl.store(out + bag * D + d, tl.sum(total, 0), mask=d < D)


def gradients(
    W_dec: Tensor, g: Tensor, centred: Tensor, latent: Tensor, value: Tensor, row: Tensor, bag: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the encoder, W_dec and b_enc; each hit's vectors are read once (as `step._Hits.gradients`).

    The list of hits is cut into segments of `_SEGMENT` hits. A second pass adds the parts of latents with more hits.

    Parameters
    ----------
    W_dec: float32 [n, d].
    g: float32 [bags, d], gradient of the reconstructions.
    centred: float32 [rows, d_in], the centred inputs.
    latent, value, row, bag: [hits] (value float32, the others int64), sorted by latent.
    """
    (n, d), d_in, hits = W_dec.shape, centred.shape[1], len(latent)
    first = torch.searchsorted(latent, torch.arange(n + 1, device=latent.device))
    whole = g.new_empty(n, d_in), g.new_empty(n, d), g.new_empty(n)
    block, block_in = triton.next_power_of_2(d), triton.next_power_of_2(d_in)
    shape: dict[str, Any] = {
        "D": d, "D_IN": d_in, "BLOCK": block, "BLOCK_IN": block_in, "SEGMENT": _SEGMENT,
        "num_warps": _warps(max(block, block_in)),
    }  # fmt: skip
    inputs = W_dec, g, centred, latent, value, row, bag, first
    _gradients[(n,)](*inputs, *whole, hits, PARTS=False, **shape)
    if hits > _SEGMENT:
        cuts = 2 * triton.cdiv(hits, _SEGMENT)
        parts = g.new_empty(cuts, d_in), g.new_empty(cuts, d), g.new_empty(cuts)
        _gradients[(cuts,)](*inputs, *parts, hits, PARTS=True, **shape)
        _add_parts[(n,)](latent, first, *parts, *whole, **shape)
    return whole


@triton.jit
def _gradients(
    W_dec, g, centred, latent, value, row, bag, first, encoder_out, decoder_out, bias_out, hits,
    D: tl.constexpr, D_IN: tl.constexpr, BLOCK: tl.constexpr, BLOCK_IN: tl.constexpr,
    SEGMENT: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0).to(tl.int64)
    if PARTS:  # an even number takes the first latent of its segment, an odd number the last
        begin = (number // 2) * SEGMENT
        end = tl.minimum(begin + SEGMENT, hits)
        unit = tl.load(latent + tl.where(number % 2 == 0, begin, end - 1))
        start, stop = tl.load(first + unit), tl.load(first + unit + 1)
        wanted = (stop - start > SEGMENT) & ((number % 2 == 0) | (start > begin))
        start, stop = tl.maximum(start, begin), tl.minimum(stop, end)
    else:
        unit = number
        start, stop = tl.load(first + unit), tl.load(first + unit + 1)
        wanted = stop - start <= SEGMENT
    if wanted:
        d, d_in = tl.arange(0, BLOCK), tl.arange(0, BLOCK_IN)
        direction = tl.load(W_dec + unit * D + d, mask=d < D, other=0.0)
        encoder, decoder = tl.zeros([BLOCK_IN], dtype=tl.float32), tl.zeros([BLOCK], dtype=tl.float32)
        bias = 0.0
        for hit in range(start, stop):
            weight = tl.load(value + hit)
            error = tl.load(g + tl.load(bag + hit) * D + d, mask=d < D, other=0.0)
            x = tl.load(centred + tl.load(row + hit) * D_IN + d_in, mask=d_in < D_IN, other=0.0)
            slope = tl.where(weight > 0, tl.sum(direction * error, 0), 0.0)
            decoder += weight * error
            encoder += slope * x
            bias += slope
        tl.store(encoder_out + number * D_IN + d_in, encoder, mask=d_in < D_IN)
        tl.store(decoder_out + number * D + d, decoder, mask=d < D)
        tl.store(bias_out + number, bias)


@triton.jit
def _add_parts(
    latent, first, encoder_parts, decoder_parts, bias_parts, encoder_out, decoder_out, bias_out,
    D: tl.constexpr, D_IN: tl.constexpr, BLOCK: tl.constexpr, BLOCK_IN: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    unit = tl.program_id(0).to(tl.int64)
    start, stop = tl.load(first + unit), tl.load(first + unit + 1)
    if stop - start > SEGMENT:
        d, d_in = tl.arange(0, BLOCK), tl.arange(0, BLOCK_IN)
        encoder, decoder = tl.zeros([BLOCK_IN], dtype=tl.float32), tl.zeros([BLOCK], dtype=tl.float32)
        bias = 0.0
        for segment in range(start // SEGMENT, (stop - 1) // SEGMENT + 1):
            part = 2 * segment + (start > segment * SEGMENT).to(tl.int64)
            encoder += tl.load(encoder_parts + part * D_IN + d_in, mask=d_in < D_IN, other=0.0)
            decoder += tl.load(decoder_parts + part * D + d, mask=d < D, other=0.0)
            bias += tl.load(bias_parts + part)
        tl.store(encoder_out + unit * D_IN + d_in, encoder, mask=d_in < D_IN)
        tl.store(decoder_out + unit * D + d, decoder, mask=d < D)
        tl.store(bias_out + unit, bias)


def take_off_parallel_(gradient: Tensor, weight: Tensor) -> None:
    """Project every row of `gradient` [n, d] orthogonally to the same row of `weight`, which has norm 1; in place."""
    n, d = weight.shape
    block = triton.next_power_of_2(d)
    _take_off_parallel[(n,)](gradient, weight, D=d, BLOCK=block, num_warps=_warps(block))


@triton.jit
def _take_off_parallel(gradient, weight, D: tl.constexpr, BLOCK: tl.constexpr):
    d = tl.arange(0, BLOCK)
    index = tl.program_id(0).to(tl.int64) * D + d
    g = tl.load(gradient + index, mask=d < D, other=0.0)
    w = tl.load(weight + index, mask=d < D, other=0.0)
    tl.store(gradient + index, g - tl.sum(g * w, 0) * w, mask=d < D)


def normalise_(weight: Tensor) -> None:
    """Scale the rows of `weight` [n, d] to norm 1, in place."""
    n, d = weight.shape
    block = triton.next_power_of_2(d)
    _normalise[(n,)](weight, D=d, BLOCK=block, num_warps=_warps(block))


@triton.jit
def _normalise(weight, D: tl.constexpr, BLOCK: tl.constexpr):
    d = tl.arange(0, BLOCK)
    index = tl.program_id(0).to(tl.int64) * D + d
    w = tl.load(weight + index, mask=d < D, other=0.0)
    tl.store(weight + index, w / tl.sqrt(tl.sum(w * w, 0)), mask=d < D)


def update_rows_(
    weight: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, step: Tensor,
    rate: float, betas: tuple[float, float], eps: float,
) -> None:  # fmt: skip
    """`take_off_parallel_`, a step of torch's AdamW without weight decay, and `normalise_`, in one pass and in place.

    It moves 28 bytes per weight, the three passes move 12 + 28 + 8. As in torch, 1 - beta^step is computed in float64.
    The logarithms of the betas are passed in float32, which changes it by less than one part in 10^7.

    Parameters
    ----------
    weight, gradient: float32 [n, d], rows of norm 1, and their gradient, which is only read.
    mean, square: float32 [n, d], AdamW's `exp_avg` and `exp_avg_sq`.
    step: float32 scalar on the device, the number of this step, from 1.
    """
    n, d = weight.shape
    block = triton.next_power_of_2(d)
    numbers = float(rate), eps, *betas, *(1 - beta for beta in betas), *map(math.log, betas)
    _update_rows[(n,)](
        weight, gradient, mean, square, step, *numbers, D=d, BLOCK=block, num_warps=_warps(block)
    )  # fmt: skip


@triton.jit
def _update_rows(
    weight, gradient, mean, square, step, rate, eps, beta1, beta2, rest1, rest2, log1, log2,
    D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    number = tl.load(step).to(tl.float64)
    size = (rate / (1.0 - tl.exp(number * log1))).to(tl.float32)
    unbiased = tl.sqrt((1.0 - tl.exp(number * log2)).to(tl.float32))
    d = tl.arange(0, BLOCK)
    index = tl.program_id(0).to(tl.int64) * D + d
    w = tl.load(weight + index, mask=d < D, other=0.0)
    g = tl.load(gradient + index, mask=d < D, other=0.0)
    g -= tl.sum(g * w, 0) * w
    m = beta1 * tl.load(mean + index, mask=d < D, other=0.0) + rest1 * g
    v = beta2 * tl.load(square + index, mask=d < D, other=0.0) + rest2 * g * g
    w -= size * m / (tl.sqrt(v) / unbiased + eps)
    tl.store(mean + index, m, mask=d < D)
    tl.store(square + index, v, mask=d < D)
    tl.store(weight + index, w / tl.sqrt(tl.sum(w * w, 0)), mask=d < D)
