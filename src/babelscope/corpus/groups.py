"""Parallel groups: texts that are translations or paraphrases of each other, and therefore in the same split."""

import math
from decimal import Decimal
from typing import Any

import polars as pl


def name_of(value: Any) -> str | None:
    """The group that a value of a column or key names; None if the text is a group of its own.

    A whole number names the same group as an integer, as a float (1, 1.0) and as a string of digits, since a column
    with missing values is often stored as float. Null, NaN and an empty string name no group.

    Raises
    ------
    TypeError: the value is a list, a struct or bytes.
    """
    if isinstance(value, list | tuple | dict | set | bytes | bytearray | memoryview | pl.Series):
        raise TypeError(f"{type(value).__name__} instead of a string or a number")
    if isinstance(value, float | Decimal):
        if not math.isfinite(value):
            return None
        value = int(value) if value == int(value) else value
    return None if value is None else str(value).strip() or None


def join(texts: pl.DataFrame, same: str = "text_id") -> pl.DataFrame:
    """Join groups that share a text, since otherwise the text and its translation could be in different splits.

    Rows with the same value in the column `same` are one text. A joined group takes the smallest of the names.
    """
    shared = texts.select(same, "group").unique().filter(pl.len().over(same) > 1).sort(same, "group")
    parent: dict[str, str] = {}

    def root(group: str) -> str:
        while parent.get(group, group) != group:
            group = parent[group]
        return group

    for groups in shared.group_by(same, maintain_order=True).agg("group")["group"].to_list():
        roots = sorted({root(group) for group in groups})
        parent.update(dict.fromkeys(roots, roots[0]))
    names = {group: root(group) for group in sorted(set(shared["group"].to_list()))}
    return texts.with_columns(pl.col("group").replace(names)) if names else texts
