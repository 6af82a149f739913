"""One forward pass over a batch: the activations of its own tokens at every hookpoint."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from babelscope.errors import UserError
from babelscope.models import hookpoints as hooks
from babelscope.models.tokens import TokenizedText, pad


def names_to_read(hookpoints: Sequence[str], transcode: bool) -> list[str]:
    """The hookpoints, and where `transcode` the inputs of their modules, too, as `hookpoints.read` calls them."""
    return [*hookpoints, *(name + hooks.INPUT for name in hookpoints if transcode)]


def own_activations(
    model: Any, hookpoints: Sequence[str], batch: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """One forward pass over a batch.

    Parameters
    ----------
    model: a causal language model.
    hookpoints: what to read, see `babelscope.models.hookpoints.read`.
    batch: token ids, attention mask and own-token mask, each `[texts, longest]`, on the model's device (see `collate`).
    dtype: of the result.

    Returns
    -------
    `[own tokens, d]` by hookpoint, text after text, special tokens and padding left out.

    Raises
    ------
    UserError: an activation is not finite, or not in `dtype`, or a hookpoint does not give one vector per token.
    """
    ids, mask, own = batch
    seen = hooks.read(model, hookpoints, input_ids=ids, attention_mask=mask)
    for name in hookpoints:
        if seen[name].dim() != 3 or seen[name].shape[:2] != own.shape:  # split into heads, or routed to experts
            raise UserError(
                f"params.yaml: hookpoints: {name!r} does not give one vector per token, but {list(seen[name].shape)}; "
                "allowed: modules that do, such as a block, its attention, its MLP or the MLP's activation function"
            )
    rows = {name: seen[name][own].to(dtype) for name in hookpoints}
    for name, activations in rows.items():
        if not torch.isfinite(activations).all():
            if not torch.isfinite(seen[name][own]).all():
                computed = str(seen[name].dtype).removeprefix("torch.")
                raise UserError(
                    f"params.yaml: extract.dtype: the model's activations at {name} are infinite or not a number in "
                    f"{computed}; allowed: float32 has the largest range (or are its weights damaged?)"
                )
            raise UserError(
                f"params.yaml: extract.store_dtype: activations at {name} do not fit in it "
                "(infinite or not a number); allowed: bfloat16 has the range of float32"
            )
    return rows


def widths(model: Any, hookpoints: Sequence[str]) -> dict[str, int]:
    """The d of what is read at each hookpoint, from a forward pass over a single token."""
    ids = torch.zeros((1, 1), dtype=torch.int64, device=hooks.device_of(model))
    seen = hooks.read(model, hookpoints, input_ids=ids, attention_mask=torch.ones_like(ids))
    return {name: seen[name].shape[-1] for name in hookpoints}


def collate(batch: Sequence[TokenizedText]) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, attention mask and own-token mask, each `[texts, longest]`."""
    ids, mask = pad(batch)
    own = mask.bool()
    for row, text in enumerate(batch):
        own[row, : text.special] = False
    return ids, mask, own
