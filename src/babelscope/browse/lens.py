"""The tokens that a feature's decoder direction promotes and suppresses, in readable form."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Extremes(NamedTuple):
    """The tokens with the most extreme logits: ids (int64) and logits (float32), `[features, tokens]` each."""

    promoted: Tensor
    promoted_logits: Tensor
    suppressed: Tensor
    suppressed_logits: Tensor


def extremes(logits: Iterable[Tensor], tokens: int, has_text: Tensor | None = None) -> Extremes:
    """The `tokens` largest and smallest logits of every row, the most extreme first; ties go to the smaller token id.

    `logits`: float32 `[rows, vocabulary]` each, see `babelscope.models.logit_lens.direct_logits`. `has_text`: bool
    `[vocabulary]`, which ids are tokens (see `tokens_of`); the others are left out. None: all are.
    """
    parts: list[list[Tensor]] = []
    for rows in logits:
        ids = torch.arange(rows.shape[1]) if has_text is None else has_text.nonzero().squeeze(1)
        known = rows if len(ids) == rows.shape[1] else rows[:, ids.to(rows.device)]
        ends = []
        for largest in (True, False):
            columns = _extreme(known, min(tokens, len(ids)), largest)
            ends += [ids[columns.cpu()], known.gather(1, columns).cpu()]
        parts.append(ends)
    if not parts:
        none, values = torch.zeros((0, tokens), dtype=torch.int64), torch.zeros((0, tokens))
        return Extremes(none, values, none, values)
    return Extremes(*(torch.cat(list(part)) for part in zip(*parts, strict=True)))


def _extreme(rows: Tensor, count: int, largest: bool) -> Tensor:
    """Columns of the `count` largest or smallest values of every row, int64 `[rows, count]`, in that order."""
    # One more than needed: top-k breaks ties arbitrarily, and the next value reveals a tie at the border.
    values, columns = rows.topk(min(count + 1, rows.shape[1]), dim=1, largest=largest)
    columns = columns[:, :count].sort(dim=1).values
    columns = columns.gather(1, rows.gather(1, columns).sort(dim=1, descending=largest, stable=True).indices)
    if values.shape[1] > count > 0:
        for row in (values[:, count - 1] == values[:, count]).nonzero().flatten().tolist():
            least = values[row, count]
            candidates = ((rows[row] >= least) if largest else (rows[row] <= least)).nonzero().squeeze(1)
            columns[row] = candidates[rows[row, candidates].sort(descending=largest, stable=True).indices[:count]]
    return columns


def tokens_of(tokenizer: Any, vocabulary: int) -> Tensor:
    """Which of the ids below `vocabulary` are tokens, bool `[vocabulary]`: embeddings are often padded."""
    ids = torch.tensor(sorted(tokenizer.get_vocab().values()), dtype=torch.int64)
    known = torch.zeros(vocabulary, dtype=torch.bool)
    known[ids[ids < vocabulary]] = True
    return known


def readable(tokenizer: Any, ids: Iterable[int]) -> dict[int, str]:
    r"""The text of tokens by id; the bytes of a part of a character are written as `\xe0`.

    Byte-level tokenizers have many such parts (in Tamil nearly all tokens); decoded alone, all are U+FFFD.
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
    """GPT-2's alphabet: the printable bytes of Latin-1 are themselves, the others U+0100 and up, in order."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTES = _bytes()
