"""Texts as token ids, and batches of texts of like length, so that padding costs little."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Padding in a batch, relative to its real tokens: a small corpus gives small batches rather than padded ones.
MOST_PADDING = 0.05


@dataclass(frozen=True)
class TokenizedText:
    """One text: its token ids, of which the first `special` were added by the tokenizer (e.g. BOS)."""

    text_id: str
    ids: tuple[int, ...]
    special: int

    @property
    def own(self) -> int:
        """Tokens of the text itself, special tokens not counted."""
        return len(self.ids) - self.special


def tokenize(tokenizer: Any, text_ids: Sequence[str], texts: Sequence[str], max_tokens: int) -> list[TokenizedText]:
    """Token ids of each text, cut after `max_tokens` own tokens, with the tokenizer's leading special tokens.

    Closing special tokens (EOS) are left out: in a causal model they change nothing before them.
    """
    if not texts:  # which tokenizers of `tokenizers` refuse
        return []
    own = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    leading = _leading_special_tokens(tokenizer)
    return [
        TokenizedText(text_id, (*leading, *ids[:max_tokens]), len(leading))
        for text_id, ids in zip(text_ids, own, strict=True)
    ]


def _leading_special_tokens(tokenizer: Any) -> tuple[int, ...]:
    probe = tokenizer("a", return_special_tokens_mask=True)
    mask = probe["special_tokens_mask"]
    count = mask.index(0) if 0 in mask else 0
    return tuple(probe["input_ids"][:count])


def by_length(texts: Sequence[TokenizedText]) -> list[TokenizedText]:
    """The texts by (length, text_id): an order that depends on nothing else, in which like lengths stand together."""
    return sorted(texts, key=lambda text: (len(text.ids), text.text_id))


def batches(
    texts: Sequence[TokenizedText], batch_tokens: int, most_padding: float = MOST_PADDING
) -> list[list[TokenizedText]]:
    """Cut `texts` (in `by_length` order) into batches of at most `batch_tokens` tokens, of which few are padding."""
    result: list[list[TokenizedText]] = []
    current: list[TokenizedText] = []
    real = 0
    for text in texts:
        padded = (len(current) + 1) * len(text.ids)
        if current and (padded > batch_tokens or padded > (1 + most_padding) * (real + len(text.ids))):
            result.append(current)
            current, real = [], 0
        current.append(text)
        real += len(text.ids)
    if current:
        result.append(current)
    return result


def pad(batch: Sequence[TokenizedText], pad_id: int = 0) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask `[batch, longest]` (int64), padded on the right."""
    longest = max(len(text.ids) for text in batch)
    ids = torch.full((len(batch), longest), pad_id)
    mask = torch.zeros((len(batch), longest), dtype=torch.int64)
    for row, text in enumerate(batch):
        ids[row, : len(text.ids)] = torch.tensor(text.ids)
        mask[row, : len(text.ids)] = 1
    return ids, mask
