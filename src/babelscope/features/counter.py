"""The one function that turns activations into counts per language, in bounded memory."""

from collections.abc import Sequence
from itertools import pairwise

import polars as pl
import torch
from torch import Tensor
from torch.nn.functional import threshold


class Counter:
    """Counts firings (activation > 0) per language and unit.

    Memory: five numbers per (language, unit), whatever the number of tokens.

    Parameters
    ----------
    languages: names; language codes are indices into it.
    units: number of units.
    device: of the counts and of the tensors that are added; default: the CPU.
    """

    def __init__(self, languages: Sequence[str], units: int, device: torch.device | None = None) -> None:
        self.languages, self.units = list(languages), units
        size = len(self.languages) * units
        self._tokens, self._texts = torch.zeros(2, size, dtype=torch.int64, device=device)
        self._sum = torch.zeros(size, dtype=torch.float64, device=device)
        self._max = torch.zeros(size, device=device)
        self._min = torch.full((size,), torch.inf, device=device)

    def add(self, values: Tensor, indices: Tensor, language: Tensor, text: Tensor) -> None:
        """Count a chunk of whole texts: no text may be in two chunks.

        Parameters
        ----------
        values, indices: activations and their units `[tokens, k]`; only values > 0 count.
        language, text: language code and text number of each token, int64 `[tokens]`.
        """
        fires = values > 0
        cell = (language.unsqueeze(1) * self.units + indices)[fires]
        value = values[fires].float()
        # bincount would go through all languages x units for every chunk.
        self._tokens.index_add_(0, cell, torch.ones_like(cell))
        if value.is_cuda:  # there, index_add_ adds float64 in a varying order
            self._sum.index_put_((cell,), value.double(), accumulate=True)
        else:
            self._sum.index_add_(0, cell, value.double())
        self._max.scatter_reduce_(0, cell, value, "amax")
        self._min.scatter_reduce_(0, cell, value, "amin")
        first = int(text.min()) if len(text) else 0
        owner = (text - first).unsqueeze(1).expand_as(indices)[fires]
        distinct = torch.unique(owner * len(self._tokens) + cell) % len(self._tokens)
        self._texts.index_add_(0, distinct, torch.ones_like(distinct))

    def add_dense(self, activations: Tensor, language: Tensor, text: Tensor) -> None:
        """Count a chunk of whole texts in which every unit has a value: `add` without the indices.

        If a third of all units fires, as neurons do, reductions over rows cost a fraction of sorting the firings. The
        order of the additions changes nothing: float64 holds sums of float16 values exactly.

        Parameters
        ----------
        activations: of every unit, `[tokens, units]`, any floating dtype; only values > 0 count.
        language, text: as in `add`.
        """
        tokens, texts, total, largest, smallest = (table.view(-1, self.units) for table in self.state().values())
        for code in torch.unique(language).tolist():
            rows = language == code
            x = activations[rows].float().clamp(min=0)
            number, owner = torch.unique(text[rows], return_inverse=True)
            in_text = torch.zeros((len(number), self.units), dtype=torch.int32, device=x.device)
            in_text.index_add_(0, owner, (x > 0).int())
            tokens[code] += in_text.sum(0)
            texts[code] += (in_text > 0).sum(0)
            total[code] += x.sum(0, dtype=torch.float64)
            largest[code] = torch.maximum(largest[code], x.amax(0))
            smallest[code] = torch.minimum(smallest[code], threshold(x, 0.0, torch.inf).amin(0))

    def state(self) -> dict[str, Tensor]:
        """The counts, `[languages * units]` each; copying saved counts into them resumes a count."""
        names = ("tokens", "texts", "sum", "max", "min_positive")
        return dict(zip(names, (self._tokens, self._texts, self._sum, self._max, self._min), strict=True))

    def frame(self, layer: int) -> pl.DataFrame:
        """`layer`, `unit`, `language`, `tokens`, `texts`, `sum`, `max`, `min_positive`; only rows with tokens > 0.

        Rows are ordered by language (as given) and unit.
        """
        tables = {name: table.cpu() for name, table in self.state().items()}
        cell = tables["tokens"].nonzero().squeeze(1)
        code, unit = (cell // self.units).numpy(), (cell % self.units).numpy()
        return pl.DataFrame(
            {
                "layer": pl.repeat(layer, len(cell), dtype=pl.Int32, eager=True),
                "unit": pl.Series(unit).cast(pl.Int32),
                "language": pl.Series(self.languages, dtype=pl.String).gather(pl.Series(code)),
            }
            | {name: table[cell].numpy() for name, table in tables.items()}
        )


def totals(texts: pl.DataFrame, languages: Sequence[str]) -> pl.DataFrame:
    """`language`, `tokens`, `texts` (int64) in the order of `languages`, of `texts` with `language` and `tokens`."""
    return (
        texts.group_by("language")
        .agg(pl.col("tokens").sum().cast(pl.Int64), texts=pl.len().cast(pl.Int64))
        .sort(pl.col("language").cast(pl.Enum(languages)))
    )


def whole_texts(text: Tensor, size: int) -> list[tuple[int, int]]:
    """Cut rows into chunks of about `size` rows that hold whole texts.

    Parameters
    ----------
    text: text number of each row `[rows]`; the rows of a text are neighbours.
    size: rows of a chunk; a longer text is a chunk of its own.

    Returns
    -------
    Pairs (first row, row after the last).
    """
    changes = (text[1:] != text[:-1]).nonzero().squeeze(1) + 1
    cuts = [0]
    for start, end in pairwise([0, *changes.tolist(), len(text)]):
        if end - cuts[-1] > size and start > cuts[-1]:
            cuts.append(start)
    return list(pairwise([*cuts, len(text)])) if len(text) else []
