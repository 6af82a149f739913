"""Negative log-likelihood of texts under a causal language model."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

# Rows of logits held at once: 49k entries of float32 each make a row 200 KiB.
_ROWS = 512


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
    flat, wanted = logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    losses = [
        F.cross_entropy(flat[i : i + _ROWS].float(), wanted[i : i + _ROWS], reduction="none")
        for i in range(0, len(wanted), _ROWS)
    ]
    token_nll = torch.cat(losses).view(target.shape) if losses else torch.zeros(target.shape)
    return torch.where(target, token_nll, 0.0).double().sum(1)


def targets(mask: Tensor, special: Tensor) -> Tensor:
    """Which of the tokens 1.. of each text are targets: real ones that are not special. Bool `[texts, longest - 1]`."""
    position = torch.arange(1, mask.shape[1], device=mask.device)
    return mask[:, 1:].bool() & (position >= special.unsqueeze(1))
