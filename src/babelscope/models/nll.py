"""NLL and divergence under a causal language model, computed without all logits `[tokens, vocabulary]` in memory.

With a vocabulary of 262,144, the logits of a batch are larger than the model. An NLL needs only one logit and the
log-sum-exp of all, so logits are computed for chunks of the vocabulary that stay in the cache (the online softmax of
Milakov & Gimelshein 2018, arXiv 1805.02867). Models whose logits `Head` does not reproduce compute all of them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from babelscope.models import hookpoints as hooks
from babelscope.models.matmul import linear, pad_rows
from babelscope.models.probing import probe_ids
from babelscope.models.tokens import TokenizedText

# Tokens and entries of the vocabulary in one product: 512 x 2,048 float32 logits are 4 MiB.
ROWS, COLUMNS = 512, 2048
# Rows are padded to a multiple of this, so that products have few shapes.
_MULTIPLE = 64
# If a logit in the first chunk is larger, each row's largest logit there is subtracted from all logits of the row.
_LARGE = 32.0
# Sums of exponentials below this are computed again with the largest logit subtracted.
_SMALL = 1e-20


@dataclass(frozen=True)
class Head:
    """A model's logits as a function of the unembedding's input x: `cap * tanh(scale * (W x + b) / cap)`.

    Attributes
    ----------
    unembedding: W `[vocabulary, d]` and b `[vocabulary]` or None.
    scale: 1 in most families.
    cap: Gemma 2's `final_logit_softcapping`; None for models without a cap.
    """

    unembedding: nn.Linear
    scale: float
    cap: float | None

    def logits(self, x: Tensor, first: int, last: int) -> Tensor:
        """Float32 logits `[tokens, last - first]` of a part of the vocabulary; `x` is `[tokens, d]`."""
        weight, bias = self.unembedding.weight[first:last], self.unembedding.bias
        return self.finish(linear(x, weight, None if bias is None else bias[first:last]).float())

    def finish(self, product: Tensor) -> Tensor:
        """Float32 logits from the unembedding's float32 output: the scale and the cap."""
        if self.scale != 1:
            product *= self.scale
        return product if self.cap is None else self.cap * torch.tanh(product / self.cap)

    def nll(self, x: Tensor, wanted: Tensor) -> Tensor:
        """NLL of the token `wanted[i]` (int64) given the unembedding's input `x[i]`; float32 nats `[tokens]`."""
        return _in_parts(self._nll, ROWS, x, wanted)

    def _nll(self, x: Tensor, wanted: Tensor) -> Tensor:
        tokens, x = len(x), pad_rows(x, _MULTIPLE)
        total, target = torch.zeros(len(x), device=x.device), torch.zeros(tokens, device=x.device)
        shift: Tensor | None = None
        for part, logits in self._chunks(x, wanted, target):
            if part.start == 0 and bool((largest := logits.amax(1, keepdim=True)).abs().max() > _LARGE):
                shift = largest
            total += (logits if shift is None else logits.sub_(shift)).exp_().sum(1)
        total = total[:tokens]
        found = total.log() - target if shift is None else total.log() - (target - shift[:tokens, 0])
        # Recompute tokens whose exponentials overflow float32 or vanish.
        extreme = (~((total > _SMALL) & total.isfinite())).nonzero().squeeze(1)
        if len(extreme):
            found[extreme] = self._shifted(x[extreme], wanted[extreme])
        return found

    def _chunks(self, x: Tensor, wanted: Tensor, target: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield parts of the vocabulary with their logits, and copy the logits of `wanted` to `target`."""
        for first in range(0, self.unembedding.out_features, COLUMNS):
            last = min(first + COLUMNS, self.unembedding.out_features)
            logits = self.logits(x, first, last)
            inside = ((wanted >= first) & (wanted < last)).nonzero().squeeze(1)
            target[inside] = logits[inside, wanted[inside] - first]
            yield slice(first, last), logits

    def _shifted(self, x: Tensor, wanted: Tensor) -> Tensor:
        """The NLL for logits of any size: subtracts the largest logit so far from all."""
        largest = torch.full((len(x),), -torch.inf, device=x.device)
        total, target = torch.zeros_like(largest), torch.zeros_like(largest)
        for _, logits in self._chunks(x, wanted, target):
            higher = torch.maximum(largest, logits.amax(1))
            total = total * (largest - higher).exp() + logits.sub_(higher.unsqueeze(1)).exp_().sum(1)
            largest = higher
        return total.log() + (largest - target)

    def divergence(self, x: Tensor, y: Tensor, row: Tensor) -> Tensor:
        """KL(p || q), p being the distribution given `x[row[i]]` and q the one given `y[i]`; float64 nats `[tokens]`.

        `sum_v p_v (log p_v - log q_v)` over the whole vocabulary. With the logits a of p and b of q, this is
        `sum_v e^a_v (a_v - b_v) / S - log S + log T`, S and T being the sums of `e^a_v` and `e^b_v`. All three sums are
        taken over the same chunks, relative to the largest logit so far.

        Parameters
        ----------
        x, y: the unembedding's inputs, `[n, d]` and `[tokens, d]`; `row`: int64 `[tokens]`, a row of x for each of y.
        """
        parts = [self._divergence(x, y[i : i + ROWS], row[i : i + ROWS]) for i in range(0, len(y), ROWS)]
        return torch.cat(parts) if parts else x.new_zeros(0, dtype=torch.float64)

    def _divergence(self, x: Tensor, y: Tensor, row: Tensor) -> Tensor:
        kept, row = torch.unique(row, return_inverse=True)
        sizes, padded = (len(kept), len(y)), (pad_rows(x[kept], _MULTIPLE), pad_rows(y, _MULTIPLE))
        largest = [torch.full((size, 1), -torch.inf, device=x.device) for size in sizes]
        totals = [torch.zeros(size, dtype=torch.float64, device=x.device) for size in sizes]
        difference = torch.zeros_like(totals[1])
        for first in range(0, self.unembedding.out_features, COLUMNS):
            last = min(first + COLUMNS, self.unembedding.out_features)
            both = [self.logits(z, first, last)[:size] for z, size in zip(padded, sizes, strict=True)]
            higher = [torch.maximum(top, part.amax(1, keepdim=True)) for top, part in zip(largest, both, strict=True)]
            before = [(top - new).exp().squeeze(1) for top, new in zip(largest, higher, strict=True)]
            p, q = ((part - new).exp_() for part, new in zip(both, higher, strict=True))
            totals = [total * less + part.sum(1) for total, less, part in zip(totals, before, (p, q), strict=True)]
            between = torch.linalg.vecdot(p[row], both[0][row] - both[1])
            difference = difference * before[0][row] + between
            largest = higher
        s, t = (total.log() + top.squeeze(1) for total, top in zip(totals, largest, strict=True))
        return (difference / totals[0][row] - s[row] + t).clamp_min(0)

    def gradient(self, x: Tensor, wanted: Tensor) -> Tensor:
        """The gradient of `nll(x, wanted)` with respect to `x`, `[tokens, d]`, in the dtype of `x`.

        Without a cap: `scale * (sum_y p_y W_y - W_wanted)`, p being the probabilities; the sum is taken over the same
        chunks, relative to the largest logit so far. With a cap, each logit l adds a factor `1 - (l / cap)^2`.
        """
        return _in_parts(self._gradient, ROWS, x, wanted)

    def _gradient(self, x: Tensor, wanted: Tensor) -> Tensor:
        largest = torch.full((len(x), 1), -torch.inf, device=x.device)
        total, target = torch.zeros_like(largest), torch.zeros(len(x), device=x.device)
        mean = torch.zeros(x.shape, device=x.device)
        for part, logits in self._chunks(x, wanted, target):
            higher = torch.maximum(largest, logits.amax(1, keepdim=True))
            before, now = (largest - higher).exp(), (logits - higher).exp()
            total = total * before + now.sum(1, keepdim=True)
            weight = self.unembedding.weight[part]
            mean = mean * before + linear((now * self._slope(logits)).to(weight.dtype), weight.T.contiguous()).float()
            largest = higher
        own = self._slope(target).unsqueeze(1) * self.unembedding.weight[wanted].float()
        return (self.scale * (mean / total - own)).to(x.dtype)

    def _slope(self, logits: Tensor) -> Tensor:
        """The derivative of a logit with respect to itself before the cap."""
        return torch.ones_like(logits) if self.cap is None else 1 - (logits / self.cap).square()


_heads: WeakKeyDictionary[nn.Module, Head | None] = WeakKeyDictionary()


def head_of(model: Any) -> Head | None:
    """The head of a causal language model, checked in one pass without hooks; None if it does not give its logits."""
    if model not in _heads:
        _heads[model] = _find(model)
    return _heads[model]


@torch.no_grad()
def _find(model: Any) -> Head | None:
    module = model.get_output_embeddings()
    if type(module) is not nn.Linear:  # quantised, or wrapped
        return None
    ids = probe_ids(model, 1)
    with entering_unembedding(model) as entered:
        whole = model(input_ids=ids, use_cache=False).logits[0].float()
    if len(entered) != 1 or entered[0].shape[:-1] != ids.shape:
        return None
    product = linear(entered[0][0], module.weight, module.bias).float()
    if product.shape != whole.shape:
        return None
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    scale = 1.0 if cap is not None else float((whole * product).sum() / product.square().sum())
    head = Head(module, 1.0 if abs(scale - 1) < 1e-3 else scale, cap)
    found = head.logits(entered[0][0], 0, module.out_features)
    # The tolerance is relative to each logit, since both come from the same product: a cap changes only large logits.
    dtype, size = module.weight.dtype, whole.abs()
    steps = 64 if dtype == torch.float32 else 4
    tolerance = steps * torch.finfo(dtype).eps * (size + size.median())
    return head if bool(((found - whole).abs() <= tolerance).all()) else None


class _Reached(Exception):
    """Ends a forward pass before the unembedding."""


@contextmanager
def entering_unembedding(model: Any, *, stop: bool = False) -> Iterator[list[Tensor]]:
    """While open, the yielded list collects the unembedding's inputs; with `stop`, a forward pass ends there."""
    entered: list[Tensor] = []

    def keep(_module: nn.Module, args: Any) -> None:
        entered.append(args[0])
        if stop:
            raise _Reached

    handle = model.get_output_embeddings().register_forward_pre_hook(keep)
    try:
        yield entered
    except _Reached:
        pass
    finally:
        handle.remove()


def text_nll(model: Any, ids: Tensor, mask: Tensor, special: Tensor) -> Tensor:
    """Summed NLL of each text's content tokens, given the tokens before them.

    Parameters
    ----------
    model: a causal language model, with any edits that are open.
    ids, mask: token ids and attention mask, int64 `[texts, longest]`, padded on the right.
    special: number of leading special tokens in each text, int64 `[texts]`.

    Returns
    -------
    Nats, float64 `[texts]`. A text's first token is not a target, since no token is before it; see `targets`.
    """
    return token_nll(model, ids, mask, targets(mask, special)).double().sum(1)


def targets(mask: Tensor, special: Tensor) -> Tensor:
    """Mask of the targets among tokens 1.. of each text, neither special nor padding: bool `[texts, longest - 1]`."""
    position = torch.arange(1, mask.shape[1], device=mask.device)
    return mask[:, 1:].bool() & (position >= special.unsqueeze(1))


def target_count(text: TokenizedText) -> int:
    """The number of `targets` in one text."""
    return max(len(text.ids) - max(text.special, 1), 0)


def token_nll(model: Any, ids: Tensor, mask: Tensor, target: Tensor) -> Tensor:
    """NLL of the tokens `ids[:, 1:]` in a whole pass; see `text_nll`.

    Parameters
    ----------
    model, ids, mask: as in `text_nll`.
    target: bool `[texts, longest - 1]`, the tokens to compute.

    Returns
    -------
    Nats, float32 `[texts, longest - 1]`; 0 for tokens that are not in `target`.
    """
    return output_nll(model, outputs(model, ids, mask), ids, target)


def outputs(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """What decides the model's distribution at each token of a whole pass: `[texts, longest, width]`.

    These are the unembedding's inputs, or the logits themselves if the model has no `Head`. `ids`, `mask`: as in
    `text_nll`.
    """
    return _outputs(model, lambda: model(input_ids=ids, attention_mask=mask, use_cache=False).logits)


def output_nll(model: Any, found: Tensor, ids: Tensor, target: Tensor) -> Tensor:
    """`token_nll` from the `outputs` of the pass."""
    nll = torch.zeros(target.shape, device=ids.device)
    nll[target] = _output_nll(model, found[:, :-1][target], ids[:, 1:][target])
    return nll


def backward(model: Any, ids: Tensor, mask: Tensor, target: Tensor) -> None:
    """Add the gradient of the summed NLL of the tokens in `target` to every leaf of a whole pass.

    `model`, `ids`, `mask`, `target`: as in `token_nll`. The leaves are made by edits: those whose results require a
    gradient.
    """
    head, wanted = head_of(model), ids[:, 1:][target]
    with torch.enable_grad():
        last = outputs(model, ids, mask)[:, :-1][target]
        if head is None:
            _logits_nll(last, wanted).sum().backward()  # type: ignore[no-untyped-call]
            return
    last.backward(head.gradient(last.detach(), wanted))  # type: ignore[no-untyped-call]


def stream_nll(model: Any, hidden: Tensor, wanted: Tensor) -> Tensor:
    """NLL of the token `wanted[i]` (int64) given the residual stream after all blocks, `hidden` `[tokens, d]`; nats."""

    def part(hidden: Tensor, wanted: Tensor) -> Tensor:
        return _output_nll(model, stream_outputs(model, hidden), wanted)

    return _in_parts(part, ROWS, hidden, wanted)


def stream_outputs(model: Any, hidden: Tensor) -> Tensor:
    """The `outputs` that follow from the residual stream after all blocks, `hidden` `[tokens, d]`."""
    padded = pad_rows(hidden, _MULTIPLE)
    return _outputs(model, lambda: hooks.logits_of(model, padded)).flatten(0, -2)[: len(hidden)]


def divergence(model: Any, clean: Tensor, changed: Tensor, row: Tensor) -> Tensor:
    """KL divergence of the distributions after `changed[i]` from those after `clean[row[i]]`; see `Head.divergence`.

    `clean`, `changed`: `outputs` of single tokens, `[n, width]` and `[tokens, width]`. Float64 nats, `[tokens]`.
    """
    if (head := head_of(model)) is not None:
        return head.divergence(clean, changed, row)
    p, q = (logits.double().log_softmax(1) for logits in (clean, changed))
    return nn.functional.kl_div(q, p[row], reduction="none", log_target=True).sum(1).clamp_min(0)


def _outputs(model: Any, forward: Callable[[], Tensor]) -> Tensor:
    """`outputs` of `forward`, which returns logits."""
    if head_of(model) is None:
        return forward()
    with entering_unembedding(model, stop=True) as entered:
        forward()
    return entered[0]


def _output_nll(model: Any, found: Tensor, wanted: Tensor) -> Tensor:
    head = head_of(model)
    return _logits_nll(found, wanted) if head is None else head.nll(found, wanted)


def _logits_nll(logits: Tensor, wanted: Tensor) -> Tensor:
    """NLL from whole logits `[tokens, vocabulary]`; float32 nats."""

    def part(logits: Tensor, wanted: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits.float(), wanted, reduction="none")

    return _in_parts(part, max(1, 2**23 // logits.shape[-1]), logits, wanted)


def _in_parts(part: Callable[[Tensor, Tensor], Tensor], rows: int, x: Tensor, wanted: Tensor) -> Tensor:
    """`part(x, wanted)` for `rows` rows at a time, concatenated."""
    parts = [part(x[i : i + rows], wanted[i : i + rows]) for i in range(0, len(wanted), rows)]
    return torch.cat(parts) if parts else torch.zeros(0, device=x.device)
