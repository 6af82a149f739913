"""Negative log-likelihood of texts under a causal language model."""

from typing import Any

import torch
from torch import Tensor

from babelscope.models import head
from babelscope.models.tokens import TokenizedText


def text_nll(model: Any, ids: Tensor, mask: Tensor, special: Tensor) -> Tensor:
    """Sum of the NLL of each text's own tokens, given what stands before them.

    Parameters
    ----------
    model: a causal language model; hooks that are open change what it computes.
    ids, mask: token ids and attention mask, int64 `[texts, longest]`, padded on the right.
    special: how many leading tokens of each text are special, int64 `[texts]`.

    Returns
    -------
    Nats, float64 `[texts]`. A token with nothing before it is not a target; see `targets`.
    """
    return head.pass_nll(model, ids, mask, targets(mask, special)).double().sum(1)


def targets(mask: Tensor, special: Tensor) -> Tensor:
    """Which of the tokens 1.. of each text are targets: real ones that are not special. Bool `[texts, longest - 1]`."""
    position = torch.arange(1, mask.shape[1], device=mask.device)
    return mask[:, 1:].bool() & (position >= special.unsqueeze(1))


def target_count(text: TokenizedText) -> int:
    """The number of `targets` in one text."""
    return max(len(text.ids) - max(text.special, 1), 0)
