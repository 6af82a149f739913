"""The tokens that a feature's decoder direction promotes and suppresses, as a reader can read them."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Extremes(NamedTuple):
    """The ends of the logits of some features: token ids int64 and logits float32, `[features, tokens]` each."""

    promoted: Tensor
    promoted_logits: Tensor
    suppressed: Tensor
    suppressed_logits: Tensor


def extremes(logits: Iterable[Tensor], tokens: int, has_text: Tensor | None = None) -> Extremes:
    """The `tokens` largest and smallest logits of every row, the farthest first; ties go to the smaller token id.

    Parameters
    ----------
    logits: float32 `[rows, vocabulary]` each, see `babelscope.models.logit_lens.direct_logits`.
    tokens: how many; no more than there are.
    has_text: bool `[vocabulary]`, which ids are tokens of the tokenizer, see `tokens_of`; others are left out. By
        default all.
    """
    most = tokens if has_text is None else min(tokens, int(has_text.sum()))
    parts: list[list[Tensor]] = []
    for rows in logits:
        ends = []
        for sign in (1.0, -1.0):
            signed = rows * sign
            if has_text is not None:
                signed[:, ~has_text.to(rows.device)] = -torch.inf
            ids = _largest(signed, min(most, rows.shape[1]))
            ends += [ids.cpu(), rows.gather(1, ids).cpu()]
        parts.append(ends)
    if not parts:
        ids, values = torch.zeros((0, tokens), dtype=torch.int64), torch.zeros((0, tokens))
        return Extremes(ids, values, ids, values)
    return Extremes(*(torch.cat(list(part)) for part in zip(*parts, strict=True)))


def _largest(rows: Tensor, count: int) -> Tensor:
    """Ids of the `count` largest values of every row, int64 `[rows, count]`, in the order of `extremes`."""
    values, ids = rows.topk(count, dim=1)
    # Top-k breaks ties as it likes: among those that it chose by the second sort, at the border by looking again.
    ids = ids.sort(dim=1).values
    ids = ids.gather(1, rows.gather(1, ids).sort(dim=1, descending=True, stable=True).indices)
    least = values[:, -1:]
    for row in ((rows >= least).sum(1) > count).nonzero().flatten().tolist():
        among = (rows[row] >= least[row]).nonzero().squeeze(1)
        ids[row] = among[rows[row, among].sort(descending=True, stable=True).indices[:count]]
    return ids


def tokens_of(tokenizer: Any, vocabulary: int) -> Tensor:
    """Which of the ids below `vocabulary` are tokens: bool `[vocabulary]`.

    Embeddings often have more rows than the tokenizer has tokens, for the sake of round sizes.
    """
    ids = torch.tensor(sorted(tokenizer.get_vocab().values()), dtype=torch.int64)
    known = torch.zeros(vocabulary, dtype=torch.bool)
    known[ids[ids < vocabulary]] = True
    return known


def readable(tokenizer: Any, ids: Iterable[int]) -> dict[int, str]:
    r"""The text of tokens by id; the bytes of a part of a character are written as `\xe0`.

    Byte-level tokenizers have many such parts (in Tamil nearly all): decoded alone they would all read as U+FFFD.
    """
    return {number: _text(tokenizer, number) for number in sorted(set(ids))}


def _text(tokenizer: Any, number: int) -> str:
    text = str(tokenizer.decode([number]))
    if "\ufffd" not in text:
        return text
    raw = str(tokenizer.convert_ids_to_tokens(number))
    if all(character in _BYTES for character in raw):
        return bytes(_BYTES[character] for character in raw).decode("utf-8", errors="backslashreplace")
    return raw


def _bytes() -> dict[str, int]:
    """GPT-2's alphabet: the printable bytes of Latin-1 stand for themselves, the others for U+0100 and up, in order."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTES = _bytes()
