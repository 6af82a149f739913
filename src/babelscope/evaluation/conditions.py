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
        `control` (draw number; null: the language's own units), `own_only` (asked about `ablated` alone).
    units: by hookpoint, the unit numbers of every condition.
    """

    keys: pl.DataFrame
    units: dict[str, list[list[int]]]

    def asked(self, language: Sequence[str]) -> NDArray[np.bool_]:
        """Bool `[conditions, texts]`: which pairs are wanted, `language` being that of each text."""
        ablated, own_only = self.keys["ablated"].to_numpy(), self.keys["own_only"].to_numpy()
        wanted: NDArray[np.bool_] = ~own_only[:, None] | (ablated[:, None] == np.array(language, dtype=object)[None])
        return wanted


def conditions(
    features: pl.DataFrame,
    counts: Mapping[str, pl.DataFrame],
    languages: Sequence[str],
    *,
    by_layer: bool,
    others: bool = True,
    draws: int,
    seed: int,
) -> Conditions:
    """Every condition of a run.

    All languages are evaluated under what takes out a language's units at all hookpoints; under a control, which is
    there to be compared with the diagonal, its own language alone.

    Parameters
    ----------
    features: `hookpoint`, `unit`, `language`.
    counts: by hookpoint, `unit`, `language`, `tokens` (read for controls only).
    languages: in the order wanted.
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
    keys: list[tuple[str, str | None, int | None, bool]] = [(name, None, None, False) for name in languages]
    units = {hookpoint: [own[hookpoint, name] for name in languages] for hookpoint in counts}
    random = {
        (hookpoint, name): matched(table, features, hookpoint, name, draws, seed)
        for hookpoint, table in counts.items()
        for name in languages
    }
    for name in languages:
        for draw in range(draws):
            keys.append((name, None, draw, True))
            for hookpoint in counts:
                units[hookpoint].append(random[hookpoint, name][draw])
    for alone in counts if by_layer else ():
        for name in languages:
            keys.append((name, alone, None, not others))
            for hookpoint in counts:
                units[hookpoint].append(own[hookpoint, name] if hookpoint == alone else [])
    schema = {"ablated": pl.String, "hookpoint": pl.String, "control": pl.Int32, "own_only": pl.Boolean}
    frame = pl.DataFrame(keys, schema=schema, orient="row").with_row_index("condition")
    return Conditions(frame.with_columns(pl.col("condition").cast(pl.Int64)), units)
