"""What is ablated, and on which texts: each language's units, at all hookpoints and at each alone, and controls."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from babelscope.ablation.controls import matched


class Conditions(NamedTuple):
    """Sets of units to take out.

    Attributes
    ----------
    keys: one row per condition: `condition` (its number), `ablated` (language), `hookpoint` (null: all together),
        `control` (draw number; null: the language's own units).
    units: by hookpoint, the unit numbers of every condition.
    """

    keys: pl.DataFrame
    units: dict[str, list[list[int]]]

    def numbers(self, chosen: pl.Expr) -> list[int]:
        """The numbers of the conditions whose keys meet `chosen`."""
        return self.keys.filter(chosen)["condition"].to_list()

    def only(self, *chosen: pl.Expr) -> "Conditions":
        """The conditions whose keys meet the first of `chosen`, then those that meet the next, numbered anew."""
        rows = [number for some in chosen for number in self.numbers(some)]
        keys = self.keys[rows].with_columns(condition=pl.int_range(len(rows), dtype=pl.Int64, eager=True))
        return Conditions(keys, {name: [sets[row] for row in rows] for name, sets in self.units.items()})

    def asked(self, language: Sequence[str], tokens: NDArray[np.int64], others_tokens: int | None) -> NDArray[np.bool_]:
        """Which pairs of condition and text are evaluated.

        At all hookpoints together: a language's own texts, and of each other language a sample of about `others_tokens`
        tokens. Under a control: its own texts, and a sample of about as many tokens of all other languages together as
        the language itself has. With a hookpoint alone: half of its own texts, and of the others as under a control.
        The texts of a smaller sample are in every larger one.

        Parameters
        ----------
        language: of each text; the texts in `by_length` order, so that a sample has all lengths.
        tokens: target tokens of each text.
        others_tokens: null: all texts.

        Returns
        -------
        Bool `[conditions, texts]`.
        """
        names, codes = np.unique(np.array(language, dtype=str), return_inverse=True)
        total, count = (np.bincount(codes, weights=weights, minlength=len(names)) for weights in (tokens, None))
        place = np.empty(len(codes))
        for code in range(len(names)):
            mine = np.flatnonzero(codes == code)
            place[mine] = _spread(len(mine))
        share = np.ones(len(names)) if others_tokens is None else others_tokens / np.maximum(total, 1)
        share = np.maximum(share, 1 / np.maximum(count, 1))  # one text at least
        less = np.minimum(share, np.maximum(1 / max(1, len(names) - 1), 1 / np.maximum(count, 1)))
        is_alone, is_control = (self.keys[name].is_not_null().to_numpy()[:, None] for name in ("hookpoint", "control"))
        own = self.keys["ablated"].to_numpy()[:, None] == np.array(language, dtype=object)[None]
        others = np.where(is_alone | is_control, less[codes], share[codes])
        wanted: NDArray[np.bool_] = place < np.where(own, np.where(is_alone, 0.5, 1.0), others)
        return wanted


def _spread(count: int) -> NDArray[np.float64]:
    """Places of `count` texts in 0..1: those below any limit are the limit's share of them, and lie evenly.

    The order of van der Corput's sequence (0, 1/2, 1/4, 3/4, ...), the text in the middle first.
    """
    numbers, terms = np.arange(count), np.zeros(count)
    for bit in range(max(1, count).bit_length()):
        terms += ((numbers >> bit) & 1) / 2 ** (bit + 1)
    places: NDArray[np.float64] = (terms.argsort().argsort() + 0.5) / max(1, count)
    return np.roll(places, count // 2)


def conditions(
    features: pl.DataFrame,
    counts: Mapping[str, pl.DataFrame],
    totals: pl.DataFrame,
    languages: Sequence[str],
    *,
    ratio: float,
    by_layer: bool,
    draws: int,
    seed: int,
) -> Conditions:
    """Every condition of a run.

    Parameters
    ----------
    features: `hookpoint`, `unit`, `language`.
    counts: by hookpoint, `unit`, `language`, `tokens` (read for controls only).
    totals: `language`, `tokens` (of the language, on which units were counted).
    languages: in the order wanted.
    ratio: `score.ratio`, see `controls.matched`.
    by_layer: also each hookpoint alone (without controls).
    draws: controls per language; 0 for none.
    seed: of the controls.
    """
    own = {
        (hookpoint, name): features.filter((pl.col("hookpoint") == hookpoint) & (pl.col("language") == name))["unit"]
        .sort()
        .to_list()
        for hookpoint in counts
        for name in languages
    }
    keys: list[tuple[str, str | None, int | None]] = [(name, None, None) for name in languages]
    units = {hookpoint: [own[hookpoint, name] for name in languages] for hookpoint in counts}
    random = {
        (hookpoint, name): matched(table, totals, features, hookpoint, name, ratio=ratio, draws=draws, seed=seed)
        for hookpoint, table in counts.items()
        for name in languages
    }
    for name in languages:
        for draw in range(draws):
            keys.append((name, None, draw))
            for hookpoint in counts:
                units[hookpoint].append(random[hookpoint, name][draw])
    for alone in counts if by_layer else ():
        for name in languages:
            keys.append((name, alone, None))
            for hookpoint in counts:
                units[hookpoint].append(own[hookpoint, name] if hookpoint == alone else [])
    schema = {"ablated": pl.String, "hookpoint": pl.String, "control": pl.Int32}
    frame = pl.DataFrame(keys, schema=schema, orient="row").with_row_index("condition")
    return Conditions(frame.with_columns(pl.col("condition").cast(pl.Int64)), units)
