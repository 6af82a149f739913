"""The token ids of a whole corpus in 4 bytes a token, for passes over it that keep nothing else of it in memory."""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import polars
import torch

from babelscope.models.tokens import TokenizedText, batches, tokenize

# Texts that are cut into batches at once.
_WINDOW = 16384
# Texts tokenized at once: the tokenizer's own records take far more memory than the tokens.
_CHUNK = 4096


class PackedTexts:
    """Tokenized texts by number; those without own tokens are left out.

    Memory: 4 bytes a token and about 100 a text (a list of `TokenizedText` takes some 40 bytes a token).

    Parameters
    ----------
    texts: taken one after the other, none is kept.

    Attributes
    ----------
    text_ids: by number.
    own: own tokens of each text, int64 [texts].
    """

    def __init__(self, texts: Iterable[TokenizedText]) -> None:
        self.text_ids: list[str] = []
        self._ids, self._ends, self._special = array("i"), array("q", [0]), array("h")
        for text in texts:
            if text.own > 0:
                self.text_ids.append(text.text_id)
                self._ids.extend(text.ids)
                self._ends.append(len(self._ids))
                self._special.append(text.special)
        ends = torch.tensor(self._ends, dtype=torch.int64)
        self._lengths = ends[1:] - ends[:-1]
        self.own = self._lengths - torch.tensor(self._special, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.text_ids)

    def __getitem__(self, number: int) -> TokenizedText:
        ids = self._ids[self._ends[number] : self._ends[number + 1]]
        return TokenizedText(self.text_ids[number], tuple(ids), self._special[number])

    def __iter__(self) -> Iterator[TokenizedText]:
        return (self[number] for number in range(len(self)))

    def by_length(self) -> list[int]:
        """Numbers of the texts in the order of `babelscope.models.tokens.by_length`."""
        lengths = self._lengths.tolist()
        return sorted(range(len(self)), key=lambda number: (lengths[number], self.text_ids[number]))

    def batches(self, numbers: Sequence[int], batch_tokens: int) -> Iterator[tuple[list[int], list[TokenizedText]]]:
        """The batches that `babelscope.models.tokens.batches` makes of these texts, made as they are asked for.

        Parameters
        ----------
        numbers: texts in `by_length` order.
        batch_tokens: most tokens of a batch, padding included.

        Returns
        -------
        Pairs: the numbers of a batch's texts, and the texts.
        """
        first, window = 0, _WINDOW
        while first < len(numbers):
            some = [self[number] for number in numbers[first : first + window]]
            found = batches(some, batch_tokens)
            if first + len(some) < len(numbers):
                found.pop()  # what follows may belong to it
                if not found:
                    window *= 2
            for batch in found:
                yield list(numbers[first : first + len(batch)]), batch
                first += len(batch)


def pack(tokenizer: Any, corpus: polars.DataFrame, max_tokens: int) -> PackedTexts:
    """The texts of `corpus` (`text_id`, `text`), tokenized as by `babelscope.models.tokens.tokenize`."""
    return PackedTexts(
        text
        for part in corpus.iter_slices(_CHUNK)
        for text in tokenize(tokenizer, part["text_id"].to_list(), part["text"].to_list(), max_tokens)
    )
