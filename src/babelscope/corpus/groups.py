"""Parallel groups: texts that are the same in other words or other languages, and never in both splits."""

import math
from decimal import Decimal
from typing import Any

import polars as pl


def name_of(value: Any) -> str | None:
    """The group that a value of a column or key names; None: the text is a group of its own.

    A whole number is the same group as integer, as float (1, 1.0) and as a string of its digits, since a column with
    gaps is often stored as float. Null, NaN and an empty string name no group.

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
    """Groups that share a text are one group: else the text could be in one split and its translation in the other.

    `texts` has `group` and the column `same`, which tells texts apart; the joined group takes the smallest of the
    names.
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
