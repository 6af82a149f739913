"""Texts cut at the borders of tokens, but never inside what is read as one character."""

import unicodedata
from collections.abc import Sequence

import polars as pl

_JOINER = "\u200d"


def pieces(text: str, spans: Sequence[tuple[int, int]]) -> tuple[list[str], list[int]]:
    """Cut a text at the borders of its tokens that a reader can see.

    A byte-level tokenizer may cut one character into several tokens, and any tokenizer may separate a letter from the
    vowel signs or accents that are drawn with it (Unicode's marks). Such tokens share a piece. White space between two
    tokens belongs to the later one.

    `spans`: first and last (exclusive) character of each token; text after the last token is left out.

    Returns
    -------
    The pieces, which together are the text up to the last token, and the number of each token's piece.
    """
    starts: list[int] = []
    piece: list[int] = []
    end = 0
    for first, last in spans:
        if not starts or (first >= end and last > first and end and not _inside(text, end)):
            starts.append(end)
        piece.append(len(starts) - 1)
        end = max(end, last)
    ends = [*starts[1:], end][: len(starts)]
    return [text[a:b] for a, b in zip(starts, ends, strict=True)], piece


def _inside(text: str, index: int) -> bool:
    """Whether the characters on both sides of `index` are drawn as one."""
    if not 0 < index < len(text):
        return False
    after = text[index]
    return unicodedata.category(after).startswith("M") or _JOINER in (after, text[index - 1])


def cut(texts: pl.DataFrame, spelled: Sequence[tuple[str, Sequence[tuple[int, int]]]]) -> pl.DataFrame:
    """`text_id`, `language`, `split` of `texts`, with the lists `pieces` and `piece` (see `pieces`).

    `spelled`: text and token spans of each, from `babelscope.models.tokens.spelled`.
    """
    schema = {"pieces": pl.List(pl.String), "piece": pl.List(pl.Int64)}
    found = pl.DataFrame([pieces(text, spans) for text, spans in spelled], schema=schema, orient="row")
    return texts.select("text_id", "language", "split").hstack(found)


def by_piece(values: Sequence[float], piece: Sequence[int], count: int) -> list[float]:
    """The largest of the `values` (one per token, >= 0) in each of `count` pieces."""
    largest = [0.0] * count
    for value, number in zip(values, piece, strict=True):
        largest[number] = max(largest[number], value)
    return largest
