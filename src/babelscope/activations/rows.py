"""The rows of all stored activations: those of stage `extract`, then those of stage `extend`."""

from collections.abc import Sequence

import polars as pl

from babelscope.core.files import read_table
from babelscope.core.paths import Paths

SCHEMA = pl.Schema({
    "row": pl.Int64, "text_id": pl.String, "language": pl.String, "split": pl.String, "position": pl.Int32,
    "token_id": pl.Int32,
})  # fmt: skip
# What most readers need.
_COLUMNS = ("row", "text_id", "language", "split")


def read_rows(paths: Paths, languages: Sequence[str] | None = None, columns: Sequence[str] = _COLUMNS) -> pl.DataFrame:
    """The token tables of both stages as one; `row` is the number of a row in `store.opened`.

    Parameters
    ----------
    languages: those whose rows are returned, as a language may train SAEs without being compared; None: all.
    columns: the columns of the result.
    """
    needed = [*columns, *(name for name in ("language",) if languages is not None and name not in columns)]
    rows = read_table(paths.tokens, needed)
    if paths.extended_tokens.is_file():
        more = read_table(paths.extended_tokens, needed)
        rows = pl.concat([rows, more.with_columns(pl.col("row") + len(rows)) if "row" in needed else more])
    return rows if languages is None else rows.filter(pl.col("language").is_in(languages)).select(columns)
