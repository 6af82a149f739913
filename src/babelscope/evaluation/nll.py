"""Negative log-likelihood of texts under a causal language model."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from babelscope.matmul import fill_up
from babelscope.models import hookpoints as hooks

# Rows of logits held at once: 49k entries of float32 each make a row 200 KiB, and a cache holds some 100 of them.
_ROWS = 128


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
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    target = targets(mask, special)
    losses = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).view(target.shape)
    return torch.where(target, losses, 0.0).double().sum(1)


def token_nll(model: Any, hidden: Tensor, wanted: Tensor) -> Tensor:
    """NLL of the token `wanted[i]` (int64) given the residual stream `hidden[i]` behind all blocks; float32 nats."""
    hidden, filled = fill_up(hidden, _ROWS), fill_up(wanted, _ROWS)
    losses = [
        cross_entropy(hooks.logits_of(model, hidden[i : i + _ROWS]), filled[i : i + _ROWS])
        for i in range(0, len(filled), _ROWS)
    ]
    return torch.cat(losses)[: len(wanted)] if losses else torch.zeros(0, device=hidden.device)


def cross_entropy(logits: Tensor, wanted: Tensor) -> Tensor:
    """NLL of the token `wanted[i]` under `logits[i]` `[tokens, vocabulary]`; float32 nats."""
    losses = [
        F.cross_entropy(logits[i : i + _ROWS].float(), wanted[i : i + _ROWS], reduction="none")
        for i in range(0, len(wanted), _ROWS)
    ]
    return torch.cat(losses) if losses else torch.zeros(0, device=logits.device)


def targets(mask: Tensor, special: Tensor) -> Tensor:
    """Which of the tokens 1.. of each text are targets: real ones that are not special. Bool `[texts, longest - 1]`."""
    position = torch.arange(1, mask.shape[1], device=mask.device)
    return mask[:, 1:].bool() & (position >= special.unsqueeze(1))
