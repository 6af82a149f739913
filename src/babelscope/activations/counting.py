"""The one function that turns activations into counts per language, in bounded memory."""

from collections.abc import Sequence

import polars
import torch
from torch import Tensor


class Counter:
    """Counts firings (activation > 0) per language and unit.

    Memory: five numbers per (language, unit), whatever the number of tokens.

    Parameters
    ----------
    languages: names; language codes below are positions in it.
    units: how many units there are.
    """

    def __init__(self, languages: Sequence[str], units: int) -> None:
        self.languages, self.units = list(languages), units
        size = len(self.languages) * units
        self._tokens = torch.zeros(size, dtype=torch.int64)
        self._texts = torch.zeros(size, dtype=torch.int64)
        self._sum = torch.zeros(size, dtype=torch.float64)
        self._max = torch.zeros(size)
        self._min = torch.full((size,), torch.inf)

    def add(self, values: Tensor, indices: Tensor, language: Tensor, text: Tensor) -> None:
        """Count a chunk that holds whole texts: no text may be spread over two chunks.

        Parameters
        ----------
        values, indices: activations and their units `[tokens, k]`; only values > 0 count.
        language, text: language code and text number of each token, int64 `[tokens]`.
        """
        fires = values > 0
        place = (language.unsqueeze(1) * self.units + indices)[fires]
        value = values[fires].float()
        self._tokens += torch.bincount(place, minlength=len(self._tokens))
        self._sum.index_add_(0, place, value.double())
        self._max.scatter_reduce_(0, place, value, "amax")
        self._min.scatter_reduce_(0, place, value, "amin")
        first = int(text.min()) if len(text) else 0
        owner = (text - first).unsqueeze(1).expand_as(indices)[fires]
        distinct = torch.unique(owner * len(self._tokens) + place)
        self._texts += torch.bincount(distinct % len(self._tokens), minlength=len(self._tokens))

    def frame(self, layer: int) -> polars.DataFrame:
        """`layer`, `unit`, `language`, `tokens`, `texts`, `sum`, `max`, `min_positive`; only rows with tokens > 0.

        Rows are ordered by language (as given) and unit.
        """
        place = self._tokens.nonzero().squeeze(1)
        code = (place // self.units).numpy()
        return polars.DataFrame(
            {
                "layer": polars.repeat(layer, len(place), dtype=polars.Int32, eager=True),
                "unit": polars.Series((place % self.units).numpy()).cast(polars.Int32),
                "language": polars.Series(self.languages, dtype=polars.String).gather(polars.Series(code)),
                "tokens": self._tokens[place].numpy(),
                "texts": self._texts[place].numpy(),
                "sum": self._sum[place].numpy(),
                "max": self._max[place].numpy(),
                "min_positive": self._min[place].numpy(),
            }
        )


def whole_texts(text: Tensor, size: int) -> list[tuple[int, int]]:
    """Cut rows into chunks of about `size` rows that hold whole texts.

    Parameters
    ----------
    text: text number of each row `[rows]`; the rows of a text stand together.
    size: rows of a chunk; one longer text makes one longer chunk.

    Returns
    -------
    Pairs (first row, row after the last).
    """
    if not len(text):
        return []
    ends = torch.cat([(text[1:] != text[:-1]).nonzero().squeeze(1) + 1, torch.tensor([len(text)])]).tolist()
    cuts: list[tuple[int, int]] = []
    start = previous = 0
    for end in ends:
        if end - start > size and previous > start:
            cuts.append((start, previous))
            start = previous
        previous = end
    cuts.append((start, previous))
    return cuts
