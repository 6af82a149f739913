"""The one function that turns activations into counts per language, in bounded memory."""

from collections.abc import Sequence

import polars
import torch
from torch import Tensor
from torch.nn.functional import threshold


class Counter:
    """Counts firings (activation > 0) per language and unit.

    Memory: five numbers per (language, unit), whatever the number of tokens.

    Parameters
    ----------
    languages: names; language codes below are positions in it.
    units: how many units there are.
    device: where the counts are kept and what is added lies; by default the CPU.
    """

    def __init__(self, languages: Sequence[str], units: int, device: torch.device | None = None) -> None:
        self.languages, self.units = list(languages), units
        size = len(self.languages) * units
        self._tokens = torch.zeros(size, dtype=torch.int64, device=device)
        self._texts = torch.zeros(size, dtype=torch.int64, device=device)
        self._sum = torch.zeros(size, dtype=torch.float64, device=device)
        self._max = torch.zeros(size, device=device)
        self._min = torch.full((size,), torch.inf, device=device)

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
        # Not by bincount, which would go through all languages x units for every chunk.
        self._tokens.index_add_(0, place, torch.ones_like(place))
        self._sum.index_add_(0, place, value.double())
        self._max.scatter_reduce_(0, place, value, "amax")
        self._min.scatter_reduce_(0, place, value, "amin")
        first = int(text.min()) if len(text) else 0
        owner = (text - first).unsqueeze(1).expand_as(indices)[fires]
        distinct = torch.unique(owner * len(self._tokens) + place) % len(self._tokens)
        self._texts.index_add_(0, distinct, torch.ones_like(distinct))

    def add_dense(self, activations: Tensor, language: Tensor, text: Tensor) -> None:
        """Count a chunk of whole texts in which every unit has a value: `add` without the indices.

        Where a third of all units fires, as neurons do, reductions over rows cost a fraction of sorting the firings.
        Their order changes nothing: float64 holds the sums of float16 values exactly.

        Parameters
        ----------
        activations: of every unit, `[tokens, units]`, any floating dtype; only values > 0 count.
        language, text: as in `add`.
        """
        tokens, texts, total, largest, smallest = (table.view(-1, self.units) for table in self.state().values())
        for code in torch.unique(language).tolist():
            mine = language == code
            x = activations[mine].float().clamp(min=0)
            number, owner = torch.unique(text[mine], return_inverse=True)
            in_text = torch.zeros((len(number), self.units), dtype=torch.int32, device=x.device)
            in_text.index_add_(0, owner, (x > 0).int())
            tokens[code] += in_text.sum(0)
            texts[code] += (in_text > 0).sum(0)
            total[code] += x.sum(0, dtype=torch.float64)
            largest[code] = torch.maximum(largest[code], x.amax(0))
            smallest[code] = torch.minimum(smallest[code], threshold(x, 0.0, torch.inf).amin(0))

    def state(self) -> dict[str, Tensor]:
        """The counts themselves, `[languages * units]` each: copied to a file and back, they resume a count."""
        return {
            "tokens": self._tokens, "texts": self._texts, "sum": self._sum, "max": self._max, "min": self._min,
        }  # fmt: skip

    def frame(self, layer: int) -> polars.DataFrame:
        """`layer`, `unit`, `language`, `tokens`, `texts`, `sum`, `max`, `min_positive`; only rows with tokens > 0.

        Rows are ordered by language (as given) and unit.
        """
        tokens, texts, total, largest, smallest = (table.cpu() for table in self.state().values())
        place = tokens.nonzero().squeeze(1)
        code = (place // self.units).numpy()
        return polars.DataFrame(
            {
                "layer": polars.repeat(layer, len(place), dtype=polars.Int32, eager=True),
                "unit": polars.Series((place % self.units).numpy()).cast(polars.Int32),
                "language": polars.Series(self.languages, dtype=polars.String).gather(polars.Series(code)),
                "tokens": tokens[place].numpy(),
                "texts": texts[place].numpy(),
                "sum": total[place].numpy(),
                "max": largest[place].numpy(),
                "min_positive": smallest[place].numpy(),
            }
        )


def totals(texts: polars.DataFrame, languages: Sequence[str]) -> polars.DataFrame:
    """`language`, `tokens`, `texts` (int64) in the order of `languages`, of `texts` with `language` and `tokens`."""
    return (
        texts.group_by("language")
        .agg(polars.col("tokens").sum().cast(polars.Int64), texts=polars.len().cast(polars.Int64))
        .sort(polars.col("language").cast(polars.Enum(languages)))
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
