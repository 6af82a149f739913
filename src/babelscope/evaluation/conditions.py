"""What is to be ablated: each language's units, at all hookpoints together and at each alone, and their controls."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from babelscope.evaluation.controls import matched


class Conditions(NamedTuple):
    """Sets of units to take out.

    Attributes
    ----------
    keys: one row per condition: `condition` (its number), `ablated` (language), `hookpoint` (null: all together),
        `control` (draw number; null: the language's own units), `share` (of the texts in other languages than
        `ablated` about which the condition is asked).
    units: by hookpoint, the unit numbers of every condition.
    """

    keys: pl.DataFrame
    units: dict[str, list[list[int]]]

    def asked(self, language: Sequence[str]) -> NDArray[np.bool_]:
        """Which pairs are wanted.

        Of the texts in other languages, a share at even distances.

        Parameters
        ----------
        language: of each text; the texts in an order by which even distances give a fair sample (`by_length`).

        Returns
        -------
        Bool `[conditions, texts]`.
        """
        ablated, share = self.keys["ablated"].to_numpy(), self.keys["share"].to_numpy()[:, None]
        other = ablated[:, None] != np.array(language, dtype=object)[None]
        rank = other.cumsum(1)
        # The small term keeps 14 * (1 / 14) from falling short of 1.
        steps = np.floor(np.stack([rank - 1, rank]) * share + 1e-9)
        wanted: NDArray[np.bool_] = ~other | (steps[1] > steps[0])
        return wanted


def conditions(
    features: pl.DataFrame,
    counts: Mapping[str, pl.DataFrame],
    totals: pl.DataFrame,
    languages: Sequence[str],
    *,
    ratio: float,
    by_layer: bool,
    others: bool = True,
    draws: int,
    seed: int,
) -> Conditions:
    """Every condition of a run.

    All languages are evaluated under what takes out a language's units at all hookpoints; under a control, its own
    language and about as many texts in others.

    Parameters
    ----------
    features: `hookpoint`, `unit`, `language`.
    counts: by hookpoint, `unit`, `language`, `tokens` (read for controls only).
    totals: `language`, `tokens` (of the language, on which units were counted).
    languages: in the order wanted.
    ratio: `score.ratio`, see `controls.matched`.
    by_layer: also each hookpoint alone (without controls).
    others: whether these are evaluated on all languages, or on their own only, which costs a fraction.
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
    keys: list[tuple[str, str | None, int | None, float]] = [(name, None, None, 1.0) for name in languages]
    units = {hookpoint: [own[hookpoint, name] for name in languages] for hookpoint in counts}
    random = {
        (hookpoint, name): matched(table, totals, features, hookpoint, name, ratio=ratio, draws=draws, seed=seed)
        for hookpoint, table in counts.items()
        for name in languages
    }
    for name in languages:
        for draw in range(draws):
            keys.append((name, None, draw, 1 / max(1, len(languages) - 1)))
            for hookpoint in counts:
                units[hookpoint].append(random[hookpoint, name][draw])
    for alone in counts if by_layer else ():
        for name in languages:
            keys.append((name, alone, None, float(others)))
            for hookpoint in counts:
                units[hookpoint].append(own[hookpoint, name] if hookpoint == alone else [])
    schema = {"ablated": pl.String, "hookpoint": pl.String, "control": pl.Int32, "share": pl.Float64}
    frame = pl.DataFrame(keys, schema=schema, orient="row").with_row_index("condition")
    return Conditions(frame.with_columns(pl.col("condition").cast(pl.Int64)), units)
