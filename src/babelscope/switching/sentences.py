"""Sentences that begin in one language and go on in another, made from parallel texts."""

from collections.abc import Sequence

import polars as pl

# The positions that are looked at, relative to the first token of the second language.
BEFORE, AFTER = 4, 5
POSITIONS = range(-BEFORE, AFTER)


def switch_point(text: str, spans: Sequence[tuple[int, int]]) -> int | None:
    """The token with which the second part of a text begins: the start of a word next to the middle of the tokens.

    In scripts without spaces it is the start of a character.

    Parameters
    ----------
    text, spans: a text and the begin and end of its tokens, see `babelscope.models.tokens.spelled`.

    Returns
    -------
    A number with at least `BEFORE` tokens before it and `AFTER` from it on; None if the text is too short.
    """
    inside = range(BEFORE, len(spans) - AFTER + 1)
    starts = [i for i in inside if spans[i - 1][1] <= spans[i][0] < spans[i][1]]
    words = [i for i in starts if any(map(str.isspace, text[spans[i][0] - 1 : spans[i][0] + 1]))]
    return min(words or starts, key=lambda i: abs(2 * i - len(spans)), default=None)


def join(parts: pl.DataFrame) -> pl.DataFrame:
    """The first part of every text followed by the next `AFTER` tokens of itself and of each of its translations.

    The tokens of both parts are those of the original texts, so that a continuation is the same after every language.

    Parameters
    ----------
    parts: `group`, `language` (once in a group), `token_ids` (list), `switch` (see `switch_point`).

    Returns
    -------
    `text_id`, `group`, `language` (of the first part), `other` (of the second), `token_ids`, `switch` (how many tokens
    the first part has).
    """
    second = pl.col("token_ids").list.slice(pl.col("switch"), AFTER)
    return (
        parts.select("group", "language", "switch", first=pl.col("token_ids").list.head(pl.col("switch")))
        .join(parts.select("group", other="language", second=second), on="group", maintain_order="left_right")
        .with_columns(
            text_id=pl.concat_str("group", "language", "other", separator="/"),
            token_ids=pl.concat_list("first", "second"),
        )
        .select("text_id", "group", "language", "other", "token_ids", "switch")
    )
