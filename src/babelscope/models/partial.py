"""Partial forward passes, which compute only the tokens that a change can reach, on top of one clean pass.

In a causal model, a change at a token affects only that token and later ones, and only from its block upwards. A row is
a text under one change. The tokens of all rows are packed into one sequence, so that products are over changed tokens
only (and padding, see `pad_rows`). Attention separates the rows, and adds the clean keys and values of other tokens.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils._pytree import tree_map_only

from babelscope.models import hookpoints as hooks
from babelscope.models import probing
from babelscope.models.matmul import pad_rows

_NAME = "babelscope_partial"
# Options of attention beyond a scaled dot product. Models that use one get passes over whole texts.
_FOREIGN = ("softcap", "s_aux", "position_bias", "head_mask")


class Unsuited(Exception):
    """The model computes attention in a way that a partial pass does not reproduce."""


@dataclass(frozen=True)
class Tokens:
    """Tokens of several rows, in the order of rows and positions.

    Attributes
    ----------
    row, position: int64 `[tokens]`; a row's positions may have gaps.
    text: int64 `[rows]`, the number of each row's text in the clean pass.
    """

    row: Tensor
    position: Tensor
    text: Tensor


@dataclass
class Memory:
    """Tensors that a clean pass over a batch of texts keeps for partial passes.

    Attributes
    ----------
    ids: int64 `[texts, longest]`, padded on the right.
    keys, values: by block, `[texts, longest, heads, width]`.
    hidden: the residual stream before the requested blocks, `[texts, longest, d]`.
    """

    ids: Tensor
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)
    hidden: dict[int, Tensor] = field(default_factory=dict)


class _Attention:
    """Attention of packed tokens; each attends to its row's tokens up to itself."""

    def __init__(self, tokens: Tokens, memory: Memory, *, record: bool) -> None:
        self.tokens, self.memory, self.record = tokens, memory, record
        count = torch.bincount(tokens.row, minlength=len(tokens.text))
        first = count.cumsum(0) - count
        self.slot = torch.arange(len(tokens.row), device=tokens.row.device) - first[tokens.row]
        self.shape = (len(tokens.text), int(count.max()))
        self.reach = int(tokens.position.max()) + 1
        last = torch.zeros(self.shape, dtype=torch.int64, device=tokens.row.device)
        last[tokens.row, self.slot] = tokens.position
        self.mask = (torch.arange(self.reach, device=last.device) <= last.unsqueeze(-1)).unsqueeze(1)

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """Map `query`, `key`, `value` `[heads, tokens, width]` to the result `[tokens, heads, width]`.

        Tokens of padding (`pad_rows`) take no part, and their result is 0.
        """
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        real = query[: len(self.tokens.row)]
        keys = self._complete(self.memory.keys, layer, key[: len(real)])
        values = self._complete(self.memory.values, layer, value[: len(real)])
        padded = real.new_zeros((*self.shape, *real.shape[1:]))
        padded[self.tokens.row, self.slot] = real
        out = F.scaled_dot_product_attention(
            padded.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2), self.mask, scale=scale,
            enable_gqa=real.shape[1] != keys.shape[2],
        )  # fmt: skip
        found = out.transpose(1, 2)[self.tokens.row, self.slot]
        padding = len(query) - len(real)
        return F.pad(found, (0, 0, 0, 0, 0, padding)) if padding else found

    def _complete(self, clean: dict[int, Tensor], layer: int, new: Tensor) -> Tensor:
        """The clean tensor of every row, with `new` at the computed tokens: `[rows, reach, heads, width]`."""
        if self.record:
            full = new.new_zeros((*self.memory.ids.shape, *new.shape[1:]))
            clean[layer] = full
        else:
            full = clean[layer][:, : self.reach].index_select(0, self.tokens.text)
        full[self.tokens.row, self.tokens.position] = new
        return full[:, : self.reach]


_active: list[_Attention] = []


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, _mask: Any, scaling: float | None = None, **options: Any
) -> tuple[Tensor, None]:
    """The attention function that transformers calls while `_attending` is open, on `[1, heads, tokens, width]`."""
    foreign = [name for name in _FOREIGN if options.get(name) is not None]
    if (options.get("sliding_window") or _active[-1].reach) < _active[-1].reach:
        foreign.append("sliding_window")
    layer = getattr(module, "layer_idx", None)
    if foreign or layer is None or len(query) != 1 or not getattr(module, "is_causal", True):
        raise Unsuited(", ".join(foreign) or "attention that is not causal, or has no layer_idx")
    return _active[-1](layer, query[0], key[0], value[0], scaling).unsqueeze(0), None


@contextmanager
def _attending(model: Any, attention: _Attention) -> Iterator[None]:
    from transformers import AttentionInterface

    AttentionInterface.register(_NAME, _attend)
    config = model.config.get_text_config()
    before = config._attn_implementation
    with ExitStack() as stack:
        stack.callback(setattr, config, "_attn_implementation", before)
        stack.callback(_active.remove, attention)
        config._attn_implementation = _NAME
        _active.append(attention)
        yield


def clean_pass(
    model: Any, ids: Tensor, here: Tensor, layers: Sequence[int], edits: Mapping[str, hooks.Edit]
) -> tuple[Memory, Tensor]:
    """Run one pass over whole texts.

    Parameters
    ----------
    ids: int64 `[texts, longest]`.
    here: bool `[texts, longest]`, mask of each text's tokens; they come first, and padding follows.
    layers: blocks before which the residual stream is kept.
    edits: edits by hookpoint; they get `[1, tokens, d]`, with the tokens in the order of `here.nonzero()`.

    Returns
    -------
    The tensors for partial passes, and the residual stream after the last block, `[tokens, d]`.

    Raises
    ------
    Unsuited: the model's attention is not plainly causal, or does not use transformers' attention interface.
    """
    row, position = here.nonzero(as_tuple=True)
    tokens, memory = Tokens(row, position, torch.arange(len(ids), device=ids.device)), Memory(ids)
    every = range(len(hooks.blocks(model)))
    with ExitStack() as stack:
        inputs = stack.enter_context(hooks.block_inputs(model, [layer for layer in layers if layer in every]))
        stack.enter_context(hooks.editing(model, edits))
        stack.enter_context(_attending(model, _Attention(tokens, memory, record=True)))
        last = hooks.run_blocks(model, every, None, input_ids=ids[here][None], position_ids=position[None])[0]
    if set(memory.keys) != set(every):
        raise Unsuited("not every block uses transformers' attention interface")
    for layer, packed in inputs.items():
        memory.hidden[layer] = packed.new_zeros((*ids.shape, packed.shape[-1]))
        memory.hidden[layer][here] = packed[0]
    return memory, last


def partial_pass(
    model: Any, memory: Memory, tokens: Tokens, hidden: Tensor, layers: range, edits: Mapping[str, hooks.Edit]
) -> Tensor:
    """Run blocks over a part of the tokens.

    Parameters
    ----------
    memory: the result of that pass.
    tokens: tokens to compute. The result is exact if all other tokens that they attend to are as in the clean pass.
    hidden: `[tokens, d]`, the residual stream before `layers`.
    layers: consecutive blocks.
    edits: edits by hookpoint; they get `[1, tokens or more, d]`, with padding after the tokens (`pad_rows`).

    Returns
    -------
    `[tokens, d]`, the residual stream after `layers`.
    """
    ids, position = memory.ids[tokens.text[tokens.row], tokens.position], tokens.position
    ids, position, filled = (pad_rows(x) for x in (ids, position, hidden))
    with hooks.editing(model, edits), _attending(model, _Attention(tokens, memory, record=False)):
        return hooks.run_blocks(
            model, layers, filled[None], input_ids=ids[None], position_ids=position[None]
        )[0, : len(hidden)]  # fmt: skip


@contextmanager
def _in_float32(model: Any) -> Iterator[None]:
    """While open, every block computes in float32: its weights are converted while it runs, one block at a time."""
    held: list[tuple[Tensor, Tensor]] = []

    def widen(block: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        for tensor in (*block.parameters(), *block.buffers()):
            if tensor.is_floating_point() and tensor.dtype != torch.float32:
                held.append((tensor, tensor.data))
                tensor.data = tensor.data.float()
        return tree_map_only(Tensor, lambda x: x.float() if x.is_floating_point() else x, (args, kwargs))

    def restore(*_: Any) -> None:
        while held:
            tensor, data = held.pop()
            tensor.data = data

    with ExitStack() as stack:
        stack.callback(restore)
        for block in hooks.blocks(model):
            stack.callback(block.register_forward_pre_hook(widen, with_kwargs=True).remove)
            stack.callback(block.register_forward_hook(restore).remove)
        yield


# Logits of this many tokens of a text are compared: those of all, 262,144 each in Gemma 3, would take a second.
_PROBED = 4
# By model, the length of texts for which partial passes are known to give the results of whole passes.
_suited: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


@torch.no_grad()
def suits(model: Any, longest: int) -> bool:
    """Test on two texts whether partial passes over up to `longest` tokens give the results of whole passes.

    The blocks compute in float32 for it, whatever the model's dtype, so that an attention to too many tokens is not
    taken for rounding. Only models with quantised weights keep their dtype.
    """
    if _suited.get(model, -1) >= longest:
        return True
    try:
        found = _suits(model, max(longest, 2))
    except Exception as error:  # a model with custom code may raise any error
        return probing.declined(model, "passes over parts of texts", error)
    if found:
        _suited[model] = longest
    return found


def _suits(model: Any, longest: int) -> bool:
    ids = probing.probe_ids(model, 2, longest)
    here = torch.ones_like(ids, dtype=torch.bool)
    here[1, (longest + 1) // 2 :] = False
    layers, rows = range(len(hooks.blocks(model))), [row[real][None] for row, real in zip(ids, here, strict=True)]
    logits = torch.cat([model(input_ids=row, use_cache=False).logits[0, -_PROBED:] for row in rows])
    last = [hooks.run_blocks(model, layers, None, input_ids=row)[0] for row in rows]
    if not probing.agree(hooks.logits_of(model, torch.cat([hidden[-_PROBED:] for hidden in last])), logits):
        return False
    is_quantised = not all(weight.is_floating_point() for block in hooks.blocks(model) for weight in block.parameters())
    precision = logits.dtype if is_quantised else torch.float32
    row, position = (here & (torch.arange(longest, device=ids.device) >= longest // 3)).nonzero(as_tuple=True)
    tokens = Tokens(row, position, torch.arange(2, device=ids.device))
    with _in_float32(model):
        whole = torch.cat([hooks.run_blocks(model, layers, None, input_ids=row)[0] for row in rows])
        memory, found = clean_pass(model, ids, here, layers, {})
        if not probing.agree(found, whole, precision):
            return False
        # A partial pass may start before any block.
        memory.hidden[len(layers)] = whole.new_zeros((*ids.shape, whole.shape[-1]))
        memory.hidden[len(layers)][here] = whole
        # From the top down, so that no block can reuse state that lower blocks just stored for the same tokens.
        for layer in reversed(layers):
            hidden, wanted = (memory.hidden[at][row, position].float() for at in (layer, layer + 1))
            part = partial_pass(model, memory, tokens, hidden, range(layer, layer + 1), {})
            if not probing.agree(part, wanted, precision):
                return False
    return True
