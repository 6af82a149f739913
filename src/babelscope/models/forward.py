"""Forward passes over batches of texts: the activations of their content tokens at every hookpoint."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from babelscope.core.errors import UserError
from babelscope.models import hookpoints as hooks
from babelscope.models import probing
from babelscope.models.names import input_name, module_of
from babelscope.models.processes import rank, together
from babelscope.models.tokens import TokenizedText, TokenizedTexts, pad


def names_to_read(hookpoints: Sequence[str], transcode: bool) -> list[str]:
    """The hookpoints and, if `transcode`, the names of what transcoders encode there (see `hookpoints.read`)."""
    return [*hookpoints, *(input_name(name, True) for name in hookpoints if transcode)]


class Rows(NamedTuple):
    """The content tokens of one batch, text after text, without special tokens and padding.

    Attributes
    ----------
    activations: by hookpoint, `[tokens, d]`, on the model's device.
    text: number of each token's text, int64 `[tokens]`, on the CPU; `codes[rows.text]` gives the language codes.
    """

    activations: dict[str, Tensor]
    text: Tensor


@torch.no_grad()
def read_batches(
    model: Any,
    texts: TokenizedTexts,
    batches: Iterable[Sequence[int]],
    hookpoints: Sequence[str],
    dtype: torch.dtype,
) -> Iterator[Rows]:
    """Run one forward pass per batch, up to the deepest hookpoint.

    Parameters
    ----------
    batches: the numbers of each batch's texts, see `TokenizedTexts.batches`.
    hookpoints: names to read, see `names_to_read`.
    dtype: dtype of the activations.

    Raises
    ------
    UserError: see `content_activations`.
    """
    device = hooks.device_of(model)
    for numbers in batches:
        ids, mask, content = (part.to(device) for part in collate(texts[numbers]))
        text = torch.tensor(numbers).repeat_interleave(texts.lengths[numbers])
        yield Rows(content_activations(model, hookpoints, (ids, mask, content), dtype), text)


def read_divided(
    model: Any,
    texts: TokenizedTexts,
    batches: Sequence[Sequence[int]],
    hookpoints: Sequence[Sequence[str]],
    dtype: torch.dtype,
) -> Iterator[Rows]:
    """Yield what `read_batches` yields for the names of this process, from passes that all processes divide.

    In every round, each process runs the forward pass over one batch, and sends to every other process the activations
    that the other reads. A batch is computed whole, so that the bits are those of a single process. Every process must
    read to the end.

    Parameters
    ----------
    hookpoints: for every process, the names that it reads. With one process, this is `read_batches`.

    Raises
    ------
    UserError: see `content_activations`; a process raises it if the pass of any has failed.
    """
    if len(hookpoints) == 1:
        yield from read_batches(model, texts, batches, hookpoints[0], dtype)
        return
    own, device = rank(), hooks.device_of(model)
    names = [name for share in hookpoints for name in share]
    for first in range(0, len(batches), len(hookpoints)):
        numbers = batches[first : first + len(hookpoints)]
        tokens = [int(texts.lengths[batch].sum()) for batch in numbers] + [0] * (len(hookpoints) - len(numbers))
        # A process without a batch runs one of the others' and sends no row, so that it knows all widths.
        batch = numbers[own if own < len(numbers) else 0]
        passes = read_batches(model, texts, [batch], names, dtype)
        read = together(lambda passes=passes: next(passes), device).activations  # type: ignore[misc]
        widths = [sum(read[name].shape[1] for name in share) for share in hookpoints]
        sent = torch.cat([read[name][: tokens[own]].flatten() for name in names])
        sizes = [count * widths[own] for count in tokens]
        received = sent.new_empty(sum(sizes))
        distributed.all_to_all_single(received, sent, sizes, [tokens[own] * width for width in widths])
        for batch, count, part in zip(numbers, tokens, torch.split(received, sizes), strict=False):
            flat = torch.split(part, [count * read[name].shape[1] for name in hookpoints[own]])
            rows = {name: x.view(count, -1) for name, x in zip(hookpoints[own], flat, strict=True)}
            yield Rows(rows, torch.tensor(batch).repeat_interleave(texts.lengths[batch]))


def content_activations(
    model: Any, hookpoints: Sequence[str], batch: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Run one forward pass over a batch (of `collate`, on the model's device): `[content tokens, d]` by hookpoint.

    Raises
    ------
    UserError: an activation is not finite in the model's dtype or in `dtype`, or a hookpoint does not give one vector
        per token.
    """
    ids, mask, content = batch
    seen = hooks.read(model, hookpoints, input_ids=ids, attention_mask=mask)
    rows = {}
    for name in hookpoints:
        _check_shape(name, seen[name], content.shape, "hookpoints")
        rows[name] = seen[name][content].to(dtype)
        if torch.isfinite(rows[name]).all():
            continue
        if not torch.isfinite(seen[name][content]).all():
            computed = str(seen[name].dtype).removeprefix("torch.")
            raise UserError(
                f"params.yaml: extract.dtype: the model's activations at {name} are infinite or not a number in "
                f"{computed}; set it to float32, which has the largest range, or check the model's weights for damage"
            )
        raise UserError(
            f"params.yaml: extract.store_dtype: activations at {name} do not fit in it (infinite or not a number); "
            "set it to bfloat16, which has the range of float32"
        )
    return rows


def _check_shape(name: str, activations: Tensor, shape: torch.Size, key: str) -> None:
    if activations.dim() != 3 or activations.shape[:2] != shape:  # split into heads, or routed to experts
        raise _refusal(name, f"does not give one vector per token, but {list(activations.shape)}", key)


def _refusal(name: str, reason: str, key: str) -> UserError:
    return UserError(
        f"params.yaml: {key}: {name!r} {reason}; "
        "allowed: modules that give one vector per token, such as a block, its attention, its MLP or the MLP's act_fn"
    )


@torch.inference_mode()
def widths(model: Any, hookpoints: Sequence[str], key: str = "hookpoints") -> dict[str, int]:
    """The d of each hookpoint (see `hookpoints.read`), from passes over a few tokens that also check the hookpoints.

    `key` is the key of the hookpoints in params.yaml.

    Raises
    ------
    UserError: a hookpoint does not give one vector per token, gives them in another order (experts that each take the
        tokens routed to them), or runs several times in a pass (a module that several blocks share).
    """
    ids = probing.probe_ids(model)
    modules = sorted({module_of(name)[0] for name in hookpoints})
    for name, count in hooks.calls(model, modules, ids).items():
        if count > 1:
            reason = f"does not give one vector per token: a forward pass runs its module {count} times"
            raise _refusal(name, reason, key)
    together = hooks.read(model, hookpoints, input_ids=ids, attention_mask=torch.ones_like(ids))
    for name in hookpoints:
        _check_shape(name, together[name], ids.shape, key)
    # In a batch, a text must give the rows that it gives alone. If rows are in another order than tokens, those of the
    # last text most likely belong to other texts.
    for text in (0, len(ids) - 1):
        one = ids[text : text + 1]
        alone = hooks.read(model, hookpoints, input_ids=one, attention_mask=torch.ones_like(one))
        for name in hookpoints:
            if not _in_order(together[name][text], alone[name][0]):
                raise _refusal(name, "does not give its vectors in the order of the tokens", key)
    return {name: together[name].shape[-1] for name in hookpoints}


def _in_order(found: Tensor, wanted: Tensor) -> bool:
    """Whether rows `[tokens, d]` are in the order of `wanted`: three quarters of them are nearest to the same row.

    All of them need not be, since in low precision a token may be routed to another expert.
    """
    distance = (found.float().unsqueeze(1) - wanted.float().unsqueeze(0)).norm(dim=-1)
    return bool((distance.diagonal() <= distance.amin(1)).float().mean() >= 0.75)


def collate(batch: Sequence[TokenizedText]) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, attention mask and content mask, each `[texts, longest]`."""
    ids, mask = pad(batch)
    content = mask.bool()
    for row, text in enumerate(batch):
        content[row, : text.special] = False
    return ids, mask, content
