"""NLL of tokens from what enters the unembedding, without logits `[tokens, vocabulary]`.

A vocabulary of 262,144 makes the logits of a batch larger than the model. An NLL needs their log-sum-exp and one of
them: the vocabulary is read in chunks whose logits stay in the cache (the online softmax of Milakov & Gimelshein 2018,
arXiv 1805.02867). A model whose logits are no product with the unembedding, scaled or capped, is asked for all of them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from babelscope.models import hookpoints as hooks
from babelscope.models.matmul import fill_up, linear

# Tokens and entries of the vocabulary in one product: 512 x 2,048 float32 logits are 4 MiB.
ROWS, COLUMNS = 512, 2048
# Rows are filled up to a multiple of this, so that products have few shapes.
_MULTIPLE = 128
# Sums of exponentials below this are taken again, shifted by the largest logit.
_SMALL = 1e-20


@dataclass(frozen=True)
class Head:
    """How a model makes logits from what enters its unembedding: `cap * tanh(scale * (W x + b) / cap)`.

    Attributes
    ----------
    unembedding: W `[vocabulary, d]` and b `[vocabulary]` or null.
    scale: 1 in most families.
    cap: null for none (Gemma 2's `final_logit_softcapping`).
    """

    unembedding: nn.Linear
    scale: float
    cap: float | None

    def logits(self, x: Tensor, first: int, last: int) -> Tensor:
        """Float32 logits `[tokens, last - first]` of a part of the vocabulary; `x` is `[tokens, d]`."""
        weight, bias = self.unembedding.weight[first:last], self.unembedding.bias
        found = linear(x, weight, None if bias is None else bias[first:last]).float()
        if self.scale != 1:
            found *= self.scale
        return found if self.cap is None else self.cap * torch.tanh(found / self.cap)

    def nll(self, x: Tensor, wanted: Tensor) -> Tensor:
        """Nats of the token `wanted[i]` (int64) given `x[i]`, what enters the unembedding; float32 `[tokens]`."""
        parts = [self._nll(x[i : i + ROWS], wanted[i : i + ROWS]) for i in range(0, len(x), ROWS)]
        return torch.cat(parts) if parts else torch.zeros(0, device=x.device)

    def _nll(self, x: Tensor, wanted: Tensor) -> Tensor:
        tokens, x = len(x), fill_up(x, _MULTIPLE)
        total, target = self._sums(x, wanted)
        found = total.log()[:tokens] - target
        # Their exponentials are beyond float32, or so small that they are lost.
        extreme = (~((total[:tokens] > _SMALL) & total[:tokens].isfinite())).nonzero().squeeze(1)
        if len(extreme):
            found[extreme] = self._shifted(x[extreme], wanted[extreme])
        return found

    def _chunks(self, x: Tensor, wanted: Tensor, target: Tensor) -> Iterator[Tensor]:
        """The logits of the vocabulary, chunk by chunk; those of `wanted` are copied to `target`."""
        for first in range(0, self.unembedding.out_features, COLUMNS):
            last = min(first + COLUMNS, self.unembedding.out_features)
            logits = self.logits(x, first, last)
            here = ((wanted >= first) & (wanted < last)).nonzero().squeeze(1)
            target[here] = logits[here, wanted[here] - first]
            yield logits

    def _sums(self, x: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of the exponentials of the logits, `[rows]`, and the logits of `wanted`, `[tokens]`."""
        total, target = torch.zeros(len(x), device=x.device), torch.zeros(len(wanted), device=x.device)
        for logits in self._chunks(x, wanted, target):
            total += logits.exp_().sum(1)
        return total, target

    def _shifted(self, x: Tensor, wanted: Tensor) -> Tensor:
        """The NLL by logits that the largest so far is taken off of: for logits of any size."""
        largest = torch.full((len(x),), -torch.inf, device=x.device)
        total, target = torch.zeros_like(largest), torch.zeros_like(largest)
        for logits in self._chunks(x, wanted, target):
            higher = torch.maximum(largest, logits.amax(1))
            total = total * (largest - higher).exp() + logits.sub_(higher.unsqueeze(1)).exp_().sum(1)
            largest = higher
        return total.log() + (largest - target)


_heads: WeakKeyDictionary[nn.Module, Head | None] = WeakKeyDictionary()


def head_of(model: Any) -> Head | None:
    """The head of a causal language model, tried on a pass without hooks once; null: its logits are made otherwise."""
    if model not in _heads:
        _heads[model] = _find(model)
    return _heads[model]


@torch.no_grad()
def _find(model: Any) -> Head | None:
    module = model.get_output_embeddings()
    if type(module) is not nn.Linear:  # quantised, or wrapped
        return None
    # Tokens from the middle of the vocabulary: padding and the like are at its ends.
    count = model.config.get_text_config().vocab_size
    ids = torch.arange(count // 2 - 4, count // 2 + 4, device=hooks.device_of(model)).clamp(0, count - 1).unsqueeze(0)
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    try:
        whole = model(input_ids=ids, use_cache=False).logits[0].float()
    finally:
        handle.remove()
    if len(seen) != 1 or seen[0].shape[:-1] != ids.shape:
        return None
    product = linear(seen[0][0], module.weight, module.bias).float()
    if product.shape != whole.shape:
        return None
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    scale = 1.0 if cap is not None else float((whole * product).sum() / product.square().sum())
    head = Head(module, 1.0 if abs(scale - 1) < 1e-3 else scale, cap)
    found = head.logits(seen[0][0], 0, module.out_features)
    # Both come from the same product, so that each value is compared with its own size: a cap bends only large logits.
    dtype, size = module.weight.dtype, whole.abs()
    steps = 64 if dtype == torch.float32 else 4
    tolerance = steps * torch.finfo(dtype).eps * (size + size.median())
    return head if bool(((found - whole).abs() <= tolerance).all()) else None


class _Reached(Exception):
    """Ends a forward pass before the unembedding."""


@contextmanager
def _stopping(model: Any) -> Iterator[list[Tensor]]:
    """While open, a forward pass ends before the unembedding, and what would have entered it lies here."""
    seen: list[Tensor] = []

    def stop(_module: nn.Module, args: Any) -> None:
        seen.append(args[0])
        raise _Reached

    handle = model.get_output_embeddings().register_forward_pre_hook(stop)
    try:
        yield seen
    except _Reached:
        pass
    finally:
        handle.remove()


def _entering(model: Any, hidden: Tensor) -> Tensor:
    """What enters the unembedding, `[tokens, d]`, given the residual stream after all blocks, `[tokens, d]`."""
    with _stopping(model) as seen:
        hooks.logits_of(model, hidden)
    return seen[0].squeeze(1)


def stream_nll(model: Any, hidden: Tensor, wanted: Tensor) -> Tensor:
    """NLL of the token `wanted[i]` (int64) given the residual stream after all blocks, `hidden` `[tokens, d]`; nats."""
    head, parts = head_of(model), []
    for i in range(0, len(wanted), ROWS):
        x, here = fill_up(hidden[i : i + ROWS], _MULTIPLE), wanted[i : i + ROWS]
        if head is not None:
            parts.append(head.nll(_entering(model, x)[: len(here)], here))
        else:
            parts.append(_plain(hooks.logits_of(model, x)[: len(here)], here))
    return torch.cat(parts) if parts else torch.zeros(0, device=hidden.device)


def pass_nll(model: Any, ids: Tensor, mask: Tensor, target: Tensor) -> Tensor:
    """NLL of the tokens `ids[:, 1:]` in a whole pass; hooks that are open change what it computes.

    Parameters
    ----------
    model: a causal language model.
    ids, mask: token ids and attention mask, int64 `[texts, longest]`.
    target: bool `[texts, longest - 1]`, the tokens that are asked for.

    Returns
    -------
    Nats, float32 `[texts, longest - 1]`; 0 where not asked for.
    """
    head, wanted = head_of(model), ids[:, 1:][target]
    nll = torch.zeros(target.shape, device=ids.device)
    if head is None:
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        nll[target] = _plain(logits[target], wanted)
        return nll
    with _stopping(model) as seen:
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    nll[target] = head.nll(seen[0][:, :-1][target], wanted)
    return nll


def _plain(logits: Tensor, wanted: Tensor) -> Tensor:
    """NLL from whole logits `[tokens, vocabulary]`; float32 nats."""
    step = max(1, 2**23 // logits.shape[-1])
    parts = [
        nn.functional.cross_entropy(logits[i : i + step].float(), wanted[i : i + step], reduction="none")
        for i in range(0, len(wanted), step)
    ]
    return torch.cat(parts) if parts else torch.zeros(0, device=logits.device)
