"""Greedy or sampled continuations of many prompts at once, each with its own change of the states.

A change is made at every position of the prompt but the special tokens in front, and at every generated token.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from babelscope.core.errors import UserError
from babelscope.models import hookpoints as hooks
from babelscope.models import probing
from babelscope.models.names import layer_of
from babelscope.models.nll import text_nll
from babelscope.models.top_tokens import TopTokens

# Tokens of highest probability from which a token is drawn; the rest of the vocabulary has probability 0 (top-k
# sampling, Fan et al. 2018, arXiv 1805.04833).
TOP_K = 64


class Change(NamedTuple):
    """A change of the states at one place: first a component is lowered, then a vector is added.

    Attributes
    ----------
    added: float32 `[rows, d]` (or `[1, d]`, for all rows), or None.
    removed: unit vectors in the same form, or None: a state's component along its vector falls to `level`, if higher.
    level: in the units of the states.
    """

    added: Tensor | None = None
    removed: Tensor | None = None
    level: float = 0.0

    def __call__(self, x: Tensor) -> Tensor:
        """`x` `[rows, positions, d]`, changed at every position; same dtype."""
        found = x.float()
        if self.removed is not None:
            along = (found * self.removed.unsqueeze(1)).sum(2, keepdim=True)
            found = found - (along - self.level).clamp_min(0) * self.removed.unsqueeze(1)
        return (found if self.added is None else found + self.added.unsqueeze(1)).to(x.dtype)


@torch.inference_mode()
def generate(
    top: TopTokens,
    prompts: Sequence[Sequence[int]],
    changes: Mapping[str, Change],
    *,
    special: int,
    new_tokens: int,
    temperature: Sequence[float],
    seeds: Sequence[Sequence[int]],
) -> Tensor:
    """Continue every prompt while the states are changed.

    The model's own `generation_config` (repetition_penalty, top_p, ...) has no effect. End-of-text tokens are never
    generated.

    Parameters
    ----------
    top: of the model.
    prompts: token ids of each row, at least two.
    changes: by hookpoint.
    special: number of special tokens (BOS) in front of every prompt, which are not changed. The first token never is:
        it is an attention sink.
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
    from transformers import DynamicCache

    model, longest = top.model, max(map(len, prompts))
    device, cache = hooks.device_of(model), DynamicCache(config=top.model.config)
    # Padded on the left, so that the last position of every row is a token.
    token = torch.tensor([[0] * (longest - len(ids)) + list(ids) for ids in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
    stays = (mask.cumsum(1) <= max(special, 1)).unsqueeze(2)

    def edit(x: Tensor, change: Change) -> Tensor:
        return change(x) if x.shape[1] == 1 else torch.where(stays, x, change(x))

    uniform = np.stack([np.random.default_rng(list(seed)).random(new_tokens, np.float32) for seed in seeds])
    drawn = [value > 0 for value in temperature]
    end = model.generation_config.eos_token_id
    ends = torch.tensor([] if end is None else end, dtype=torch.int64).flatten().tolist()
    wanted = [TOP_K if one else 1 + len(ends) for one in drawn]
    found: list[Tensor] = []
    count = _unchanged_blocks(model, prompts, changes, cache)
    with hooks.editing(model, {name: partial(edit, change=change) for name, change in changes.items()}):
        for step in range(new_tokens):
            position = (mask.cumsum(1) - 1).clamp_min(0)[:, -token.shape[1] :]
            with nullcontext() if step else _shared(model, prompts, count, token, mask, position, cache):
                logits, tokens = top(wanted, input_ids=token, **_inputs(model, mask, position, cache))
            if not step:
                _check(model, cache, longest)
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


def _unchanged_blocks(model: Any, prompts: Sequence[Sequence[int]], changes: Mapping[str, Change], cache: Any) -> int:
    """How many blocks are below all changes; 0 if few prompts are equal, or if no pass can start above these blocks."""
    lowest = min((layer_of(name) - name.endswith(".input") for name in changes), default=0)
    is_worthwhile = lowest > 0 and 2 * len(set(map(tuple, prompts))) <= len(prompts)
    return lowest if is_worthwhile and _restarts(model, cache, lowest) else 0


@contextmanager
def _shared(
    model: Any, prompts: Sequence[Sequence[int]], count: int, token: Tensor, mask: Tensor, position: Tensor, cache: Any
) -> Iterator[None]:
    """Compute the first `count` blocks once for equal prompts, not once per row; the pass inside starts above them.

    Afterwards `cache` has the keys and values of all blocks.
    """
    if not count:
        yield
        return
    row = {tuple(ids): number for number, ids in enumerate(prompts)}
    place = {ids: number for number, ids in enumerate(row)}
    which = torch.tensor([place[tuple(ids)] for ids in prompts], device=token.device)
    one = torch.tensor(list(row.values()), device=token.device)
    below = type(cache)(config=model.config)
    hidden = hooks.run_blocks(
        model, range(count), None, input_ids=token[one], **_inputs(model, mask[one], position[one], below)
    )
    with hooks.starting_at(model, count, hidden[which]):
        yield
    for number in range(count):
        below.layers[number].batch_select_indices(which)
        cache.layers[number] = below.layers[number]


_can_restart: WeakKeyDictionary[Any, dict[int, bool]] = WeakKeyDictionary()


def _restarts(model: Any, cache: Any, layer: int) -> bool:
    """Whether a pass may start before block `layer`, and the cache has a part for each block."""
    known = _can_restart.setdefault(model, {})
    if layer not in known:
        per_block = len(getattr(cache, "layers", ())) == len(hooks.blocks(model))
        known[layer] = per_block and probing.can_restart(model, [layer])
    return known[layer]


def _check(model: Any, cache: Any, wanted: int) -> None:
    try:
        kept = int(cache.get_seq_length())
    except ValueError:  # a recurrent model's cache
        kept = 0
    if kept != wanted:
        raise UserError(f"params.yaml: model.name: {type(model).__name__} keeps no keys and values, which steer needs")


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
