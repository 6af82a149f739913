"""Greedy or sampled continuations of many prompts at once, each with its own vector added to the residual stream.

A vector is added at the last token of the prompt and at every generated token, so the earlier tokens of a prompt are
the unsteered model's, and rows with the same prompt share one pass over it.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from babelscope.core.errors import UserError
from babelscope.models import hookpoints as hooks
from babelscope.models.nll import text_nll
from babelscope.models.top_tokens import TopTokens

# Tokens of highest probability from which a token is drawn; the rest of the vocabulary has probability 0 (top-k
# sampling, Fan et al. 2018, arXiv 1805.04833).
TOP_K = 64


def changes(added: Tensor | None, removed: Tensor | None, special: int = 0) -> hooks.Edit:
    """The edit that adds `added[row]` at every position and first takes the component along `removed[row]` out.

    Parameters
    ----------
    added, removed: float32 `[rows, d]` (or `[1, d]`, for all rows) or None; rows of `removed` are unit vectors.
    special: positions at the beginning that stay as they are (BOS).
    """

    def edit(x: Tensor) -> Tensor:
        found = x[:, special:].float()
        if removed is not None:
            along = (found * removed.unsqueeze(1)).sum(2, keepdim=True)
            found = found - along * removed.unsqueeze(1)
        if added is not None:
            found = found + added.unsqueeze(1)
        return torch.cat([x[:, :special], found.to(x.dtype)], dim=1)

    return edit


@torch.inference_mode()
def generate(
    top: TopTokens,
    prompts: Sequence[Sequence[int]],
    edits: Mapping[str, hooks.Edit],
    *,
    new_tokens: int,
    temperature: Sequence[float],
    seeds: Sequence[Sequence[int]],
) -> Tensor:
    """Continue every prompt while the edits are in place.

    The model's own `generation_config` (repetition_penalty, top_p, ...) has no effect. End-of-text tokens are never
    generated.

    Parameters
    ----------
    top: of the model.
    prompts: token ids of each row, at least two; rows with equal prompts share their pass over it.
    edits: by hookpoint; they get `[rows, 1, d]`.
    new_tokens: number of tokens to generate.
    temperature: of each row; 0 takes the most probable token, else one of the `TOP_K` most probable is drawn.
    seeds: of each row's draws, which do not depend on other rows.

    Returns
    -------
    The generated tokens, int64 `[rows, new_tokens]`.

    Raises
    ------
    UserError: the model has no cache of keys and values.
    """
    model = top.model
    device, numbers = hooks.device_of(model), {tuple(ids): 0 for ids in prompts}
    numbers = {ids: number for number, ids in enumerate(numbers)}
    row = torch.tensor([numbers[tuple(ids)] for ids in prompts], device=device)
    cache, ids, mask = _prefill(model, list(numbers), device)
    cache.batch_select_indices(row)
    token, mask = ids[row, -1:], mask[row]
    uniform = np.stack([np.random.default_rng(list(seed)).random(new_tokens, np.float32) for seed in seeds])
    drawn = [value > 0 for value in temperature]
    ends = torch.tensor(model.generation_config.eos_token_id or [], dtype=torch.int64).flatten().tolist()
    found = []
    with hooks.editing(model, edits):
        for step in range(new_tokens):
            position = mask.sum(1, keepdim=True) - 1
            logits, tokens = top(TOP_K, input_ids=token, **_inputs(model, mask, position, cache))
            for end in ends:
                logits[tokens == end] = -torch.inf
            place = logits.argmax(1)
            if any(drawn):
                sampled = _pick(logits, torch.from_numpy(uniform[:, step]), torch.tensor(temperature))
                place = torch.where(torch.tensor(drawn, device=device), sampled.to(device), place)
            token = tokens.gather(1, place.unsqueeze(1))
            found.append(token.cpu())
            mask = torch.cat([mask, torch.ones_like(token)], dim=1)
    return torch.cat(found, dim=1)


def _prefill(model: Any, prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Any, Tensor, Tensor]:
    """The cache over all tokens of each prompt but the last; ids and mask, `[prompts, longest]`, padded on the left."""
    from transformers import DynamicCache

    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(one)) + list(one) for one in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in prompts], device=device)
    position = (mask.cumsum(1) - 1).clamp_min(0)
    cache = DynamicCache(config=model.config)
    hooks.body_of(model)(input_ids=ids[:, :-1], **_inputs(model, mask[:, :-1], position[:, :-1], cache))
    try:
        kept = int(cache.get_seq_length())
    except ValueError:  # a recurrent model's cache
        kept = 0
    if kept != longest - 1:
        raise UserError(f"params.yaml: model.name: {type(model).__name__} keeps no keys and values, which steer needs")
    return cache, ids, mask


def _inputs(model: Any, mask: Tensor, position: Tensor, cache: Any) -> dict[str, Any]:
    """Arguments of a pass with a cache; families without position embeddings (ALiBi) take no `position_ids`."""
    known = inspect.signature(model.forward).parameters
    name = "cache" if "cache" in known else "past_key_values"
    inputs = {"attention_mask": mask, "use_cache": True, name: cache}
    return inputs | ({"position_ids": position} if "position_ids" in known else {})


def _pick(logits: Tensor, uniform: Tensor, temperature: Tensor) -> Tensor:
    """Draw a column per row from `softmax(logits / temperature)` by inverting the cumulative distribution.

    Parameters
    ----------
    logits: float32 `[rows, candidates]`.
    uniform: float32 `[rows]`, in [0, 1).
    temperature: float `[rows]`; rows with 0 are drawn at 1.
    """
    # On the CPU: a GPU does not always add in the same order.
    scaled = logits.cpu() / torch.where(temperature > 0, temperature, torch.ones_like(temperature)).unsqueeze(1)
    cumulative = scaled.softmax(1).cumsum(1)
    wanted = uniform.unsqueeze(1) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, wanted, right=True).squeeze(1).clamp_max(logits.shape[1] - 1)


@torch.inference_mode()
def continuation_nll(model: Any, prompts: Sequence[Sequence[int]], generated: Tensor) -> Tensor:
    """Nats per generated token, given the prompt, under the model as it is now; float64 `[rows]`.

    `generated` is int64 `[rows, tokens]`.
    """
    device, longest = hooks.device_of(model), max(map(len, prompts)) + generated.shape[1]
    rows = [[*prompt, *tokens] for prompt, tokens in zip(prompts, generated.tolist(), strict=True)]
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device)
    given = torch.tensor([len(prompt) for prompt in prompts], device=device)
    return text_nll(model, ids, mask, given).cpu() / generated.shape[1]


def distinct_2(generated: Tensor) -> list[float]:
    """Distinct pairs of neighbouring tokens over all such pairs of each row (Li et al. 2016, arXiv 1510.03055)."""
    pairs = [len(set(zip(row, row[1:], strict=False))) for row in generated.tolist()]
    return [count / max(1, generated.shape[1] - 1) for count in pairs]
