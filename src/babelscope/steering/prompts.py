"""Prompts: texts, each followed by a line break, after which the model answers."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import polars as pl

from babelscope.core.errors import UserError
from babelscope.models.tokens import content_ids, positions_of, tokenize

# Prompts among which the relevance of an answer is decided (see `judge.relevant`).
CHOICES = 8


class Prompt(NamedTuple):
    """A prompt.

    Attributes
    ----------
    language: of the text.
    group: the text's parallel group.
    special: ids that the tokenizer puts before every text.
    content: token ids of the text.
    ids: what the model is given: special tokens, and the text and a line break, as often as `Lines.copies` says.
    """

    language: str
    group: str
    special: tuple[int, ...]
    content: tuple[int, ...]
    ids: tuple[int, ...]


class Lines:
    """Makes token ids of lines: the tokenizer's special tokens, and every text followed by a line break.

    Texts are cut to `max_tokens`. A prompt has its text `copies` times.
    """

    def __init__(self, tokenizer: Any, max_tokens: int, copies: int = 1) -> None:
        self.tokenizer, self.max_tokens, self.copies = tokenizer, max_tokens, copies
        [self.end] = content_ids(tokenizer, ["\n"])

    def prompts(self, texts: pl.DataFrame) -> list[Prompt]:
        """The prompts of `texts` (`text_id`, `language`, `group`, `text`), different ones only, in their order."""
        rows = tokenize(self.tokenizer, texts["text_id"].to_list(), texts["text"].to_list(), self.max_tokens)
        found: dict[tuple[int, ...], Prompt] = {}
        for row, language, group in zip(rows, texts["language"], texts["group"], strict=True):
            if row.content_tokens > 1:
                special, content = row.ids[: row.special], row.ids[row.special :]
                ids = (*special, *(*content, *self.end) * self.copies)
                found.setdefault(row.ids, Prompt(language, group, special, content, ids))
        return list(found.values())

    def after(self, prompt: Prompt, examples: Sequence[str]) -> tuple[int, ...]:
        """The ids of a prompt's text, as often as in the prompt, that follows `examples`, each in a line of its own."""
        lines = [
            token for ids in content_ids(self.tokenizer, examples) for token in (*ids[: self.max_tokens], *self.end)
        ]
        return (*prompt.special, *lines, *prompt.ids[len(prompt.special) :])


def check_fits(model: Any, prompts: Sequence[Prompt], new_tokens: int) -> None:
    """Check that the model has positions for every prompt and its answer.

    Raises
    ------
    UserError: it has fewer.
    """
    longest, positions = max((len(prompt.ids) for prompt in prompts), default=0) + new_tokens, positions_of(model)
    if 0 < positions < longest:
        raise UserError(
            f"params.yaml: steer.prompt_tokens: a prompt and its answer have {longest} tokens (steer.copies and "
            f"steer.new_tokens count), but {type(model).__name__} has only {positions} positions; lower one of them"
        )


def choose(
    lines: Lines, texts: pl.DataFrame, languages: Sequence[str], count: int, key: str = "steer.prompts"
) -> dict[str, list[Prompt]]:
    """The first `count` prompts of each prompt language, by text_id (a hash); at least `CHOICES` if there are.

    `key`: the setting of params.yaml that an error names.

    Raises
    ------
    UserError: a language has too few texts.
    """
    found = {}
    for language in languages:
        rows = lines.prompts(texts.filter(language=language).sort("text_id"))
        if len(rows) < count:
            raise UserError(f"params.yaml: {key}: {count} prompts in {language!r} wanted; there are {len(rows)}")
        found[language] = rows[: max(count, CHOICES)]
    return found


def split(texts: pl.DataFrame) -> pl.DataFrame:
    """Texts that are not the corpus's, with `split`: "train" for those of development, "eval" for those of the test.

    Development gets the first `CHOICES` texts of each language by text_id (a hash), and their translations.
    """
    first = texts.sort("text_id").group_by("language", maintain_order=True).head(CHOICES)["group"]
    developed = pl.col("group").is_in(first.unique().to_list())
    return texts.with_columns(split=pl.when(developed).then(pl.lit("train")).otherwise(pl.lit("eval")))


def example(texts: pl.DataFrame, prompt_language: str, language: str, avoid: set[str]) -> list[str]:
    """A short text in the prompt's language and its translation, as an example of the answer that is wanted.

    Without a translation, a text in the target language. `texts`: `language`, `group`, `text`, the training split;
    `avoid`: groups that are prompts.
    """
    own = texts.filter(pl.col("language") == language, ~pl.col("group").is_in(list(avoid)))
    asked = texts.filter(language=prompt_language).unique("group", keep="first", maintain_order=True)
    pairs = own.join(asked, on="group", suffix="_asked").sort(pl.col("text").str.len_chars(), "group")
    if len(pairs):
        return [pairs["text_asked"][0], pairs["text"][0]]
    shortest = own.sort(pl.col("text").str.len_chars(), "text").head(1)
    return shortest["text"].to_list()
