"""Language identification: the language whose units fire most in a text."""

from collections.abc import Mapping
from typing import Literal

import polars as pl

from babelscope.core.errors import UserError

_VALUES = ("score", "count", "tokens")


def identify(
    unit_counts: pl.DataFrame,
    units_owned: Mapping[str, int] | pl.DataFrame,
    *,
    normalize: Literal["units", "none"] = "units",
) -> pl.DataFrame:
    """The language with the highest score for each text (Andrylie et al. 2025, arXiv 2507.11230, classifier).

    The score of a text for a language is the total over the language's units (of firings, or of min-max scaled
    activations), divided by the number of those units if `normalize` is "units": raw totals favour languages that
    own many. A language without units is never predicted. Ties go to the language that owns fewer units, then to the
    first by name. (The paper breaks ties by name alone. 4 of its 7,500 raw SAE counts are ties; by the rule here, its
    97.21 % become 97.25 %.)

    Parameters
    ----------
    unit_counts: wide: one row per text, a column per language with the total over its units. Or long: one row per text
        and `language`, the total in `score`, `count` or `tokens`; an absent row is a total of 0. Null counts as 0. All
        other columns (`text_id`, ...) are ids, which are kept.
    units_owned: number of units of each language, as a mapping or as a frame `language`, `units`.
    normalize: "units" or "none" (the paper's comparison of raw totals).

    Returns
    -------
    The id columns, `predicted` (language) and `score` (float64, the winner's), in the order of the texts.

    Raises
    ------
    UserError: `normalize` is unknown, no language owns a unit, or the frame lacks the column of a language that owns
        some.
    """
    if normalize not in ("units", "none"):
        raise UserError(f"normalize: {normalize!r}; allowed: units, none")
    owned = _owned(units_owned)
    wide = unit_counts if any(name in unit_counts.columns for name in owned) else _widen(unit_counts)
    ids = [name for name in wide.columns if name not in owned]
    if {"predicted", "score"} & set(ids):
        raise UserError("unit_counts: 'predicted' and 'score' are names of the result's columns; rename yours")
    able = [name for name, units in owned.items() if units > 0]
    if not able:
        raise UserError("units_owned: no language owns a unit, so none can be identified")
    missing = [name for name in able if name not in wide.columns]
    if missing:
        raise UserError(f"unit_counts: no column for {', '.join(missing)}; it has {', '.join(wide.columns)}")
    texts = wide.with_row_index("_text")
    units = pl.DataFrame({"predicted": able, "_units": [float(owned[name]) for name in able]})
    totals = pl.col(able).cast(pl.Float64).fill_null(0.0)
    scores = texts.select("_text", totals).unpivot(index="_text", variable_name="predicted", value_name="score")
    scores = scores.join(units, on="predicted")
    if normalize == "units":
        # Series by Series: an expression multiplies by the reciprocal of a single number, and ties would differ.
        scores = scores.with_columns(scores["score"] / scores["_units"])
    ranked = scores.sort("_text", -pl.col("score"), "_units", "predicted")
    winners = ranked.unique("_text", keep="first", maintain_order=True).select("_text", "predicted", "score")
    return texts.select("_text", *ids).join(winners, on="_text", how="left", maintain_order="left").drop("_text")


def _owned(units_owned: Mapping[str, int] | pl.DataFrame) -> dict[str, int]:
    if isinstance(units_owned, pl.DataFrame):
        if not {"language", "units"} <= set(units_owned.columns):
            raise UserError(f"units_owned: needs 'language' and 'units', has {', '.join(units_owned.columns)}")
        return dict(units_owned.select(pl.col("language").cast(pl.String), "units").iter_rows())
    return dict(units_owned)


def _widen(long: pl.DataFrame) -> pl.DataFrame:
    """One row per text, a column per language: the texts in the order of their first rows."""
    values = [name for name in _VALUES if name in long.columns]
    if "language" not in long.columns or len(values) != 1:
        raise UserError(
            "unit_counts: neither a column per language of units_owned nor 'language' with one of "
            f"{', '.join(_VALUES)}; it has {', '.join(long.columns)}"
        )
    ids = [name for name in long.columns if name not in ("language", values[0])]
    return long.pivot(on="language", index=ids, values=values[0], maintain_order=True)
