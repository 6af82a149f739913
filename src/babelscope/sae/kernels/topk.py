"""Top-k: the k largest positive scores of every row, found through the maxima of groups of latents.

The k groups with the largest maxima contain the k largest scores, so only their members are compared. Both selections
partition integer keys that hold a score's bits above its position (positive floats have the order of their bits). NumPy
partitions with vector instructions, several times faster than `torch.topk`.
"""

import numpy as np
import torch
from torch import Tensor

from babelscope.sae.kernels import fused

_GROUP = 16
# Per dtype of scores: the integer dtype of that width, the key's of twice that width, and the bits for the position.
_KEYS = {torch.bfloat16: (torch.int16, torch.int32, 16), torch.float32: (torch.int32, torch.int64, 32)}


def top_k(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Exact top k of relu(`scores`) in every row.

    Parameters
    ----------
    scores: [rows, n], contiguous; bfloat16 or float32 on a CPU, anything elsewhere.
    k: number per row, at most n.

    Returns
    -------
    values: [rows, k] >= 0 in the dtype of `scores`, in no particular order.
    indices: int64 [rows, k], distinct within a row; arbitrary if the value is 0.
    """
    if _suits_groups(scores, k):
        indices = _by_groups(scores, k)
        return scores.gather(1, indices).relu_(), indices
    kernels = fused(scores)
    if kernels and kernels.suits_top_k(scores, k):
        indices = kernels.top_k(scores, k)
        return scores.gather(1, indices).relu_(), indices
    values, indices = scores.topk(k, dim=-1, sorted=False)
    return values.relu_(), indices


def _suits_groups(scores: Tensor, k: int) -> bool:
    groups, rest = divmod(scores.shape[1], _GROUP)
    on_cpu = scores.device.type == "cpu" and scores.dtype in _KEYS and scores.is_contiguous()
    return on_cpu and rest == 0 and 2 * k <= groups < 2**15 and k * _GROUP < 2**15


def _by_groups(scores: Tensor, k: int) -> Tensor:
    rows, groups = scores.shape[0], scores.shape[1] // _GROUP
    chosen = _largest(_group_maxima(scores), k)
    first = torch.arange(0, rows * groups, groups).unsqueeze(1)
    members = scores.view(rows * groups, _GROUP).index_select(0, (chosen + first).view(-1))
    best = _largest(members.view(rows, k * _GROUP), k)
    return chosen.gather(1, best.div(_GROUP, rounding_mode="floor")).mul_(_GROUP).add_(best.remainder(_GROUP))


def _group_maxima(scores: Tensor) -> Tensor:
    """Maxima of relu(scores) over runs of `_GROUP` scores: [rows, n] -> [rows, n / _GROUP]."""
    rows, groups = scores.shape[0], scores.shape[1] // _GROUP
    if scores.dtype == torch.float32:
        return scores.view(torch.int32).view(rows, groups, _GROUP).amax(-1).view(torch.float32)
    # An int32 holds two bfloat16: `amax` of int32 is four times as fast, and the upper half decides the order.
    pairs = scores.view(torch.int32).view(rows, groups, _GROUP // 2)
    maxima = torch.maximum(pairs.amax(-1), pairs.bitwise_left_shift(16).amax(-1))
    return maxima.bitwise_right_shift_(16).to(torch.int16).view(torch.bfloat16)


def _largest(scores: Tensor, k: int) -> Tensor:
    """Positions int64 [rows, k] of the k largest positive scores of every row."""
    narrow, wide, bits = _KEYS[scores.dtype]
    keys = scores.view(narrow).to(wide).bitwise_left_shift_(bits)
    keys.bitwise_or_(torch.arange(scores.shape[1], dtype=wide))
    array: np.ndarray = keys.numpy()
    array.partition(scores.shape[1] - k, axis=-1)
    return keys[:, -k:].bitwise_and(2**bits - 1).to(torch.int64)
