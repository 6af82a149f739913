"""Tokenizing texts, and batches of texts of similar length, so that there is little padding."""

import functools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress, pairwise
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from babelscope.core.errors import UserError

# Maximum padding in a batch, relative to its real tokens: a small corpus gives small batches instead of padded ones.
MOST_PADDING = 0.05
# Texts tokenized at once, since the tokenizer's own records take far more memory than the tokens.
_CHUNK = 4096


@dataclass(frozen=True)
class TokenizedText:
    """One text: its token ids, of which the tokenizer added the first `special` (such as BOS)."""

    text_id: str
    ids: tuple[int, ...]
    special: int

    @property
    def content_tokens(self) -> int:
        """The number of tokens without special tokens."""
        return len(self.ids) - self.special


def tokenize(tokenizer: Any, text_ids: Sequence[str], texts: Sequence[str], max_tokens: int) -> list[TokenizedText]:
    """The tokenizer's leading special tokens and each text's first `max_tokens` content tokens (see `content_ids`).

    Special tokens at the end (EOS) are left out: in a causal model they do not affect the tokens before them.
    """
    content = content_ids(tokenizer, texts)
    special = _leading_special_tokens(tokenizer, next((text for text, ids in zip(texts, content) if ids), ""))  # noqa: B905
    pairs = zip(text_ids, content, strict=True)
    return [TokenizedText(text_id, (*special, *ids[:max_tokens]), len(special)) for text_id, ids in pairs]


def content_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, without special tokens.

    Text that looks like a special token (`<s>`, `<|endoftext|>`) is tokenized like any other text. It is left out if no
    other tokens of the vocabulary spell it (Unigram).
    """
    return _encode(tokenizer, texts)[0]


def spelled(tokenizer: Any, texts: Sequence[str], max_tokens: int) -> list[tuple[str, list[tuple[int, int]]]]:
    """Each text, with the begin and end (in characters) of every content token that `tokenize` returns.

    Tokenizers without a fast version do not return these. For them, each text is decoded from its tokens.
    """
    if not getattr(tokenizer, "is_fast", True):
        return [_decoded(tokenizer, ids[:max_tokens]) for ids in content_ids(tokenizer, texts)]
    _, spans = _encode(tokenizer, texts, offsets=True)
    return [(text, span[:max_tokens]) for text, span in zip(texts, spans, strict=True)]


def _encode(tokenizer: Any, texts: Sequence[str], *, offsets: bool = False) -> tuple[list[Any], list[Any]]:
    """Ids and (with `offsets`) spans of the texts' content tokens."""
    if not texts:  # fast tokenizers refuse an empty list
        return [], []
    options = _as_text(tokenizer) | ({"return_offsets_mapping": True} if offsets else {})
    found = tokenizer(list(texts), add_special_tokens=False, verbose=False, **options)
    special = _special_ids(tokenizer)
    kept = [[number not in special for number in ids] for ids in found["input_ids"]]
    columns = (found["input_ids"], found["offset_mapping"] if offsets else [])
    ids, spans = ([list(compress(row, mask)) for row, mask in zip(rows, kept)] for rows in columns)  # noqa: B905
    return ids, spans


def _as_text(tokenizer: Any) -> dict[str, bool]:
    """The option to tokenize special tokens in a text as text; Mistral's own tokenizer always does."""
    return {} if type(tokenizer).__name__ == "MistralCommonBackend" else {"split_special_tokens": True}


@functools.lru_cache(1)  # Gemma's 6,000 added tokens take 30 ms
def _special_ids(tokenizer: Any) -> set[int]:
    """Ids of special tokens that are never text: all except the unknown token and those of a single character.

    Some models pad with a line feed or an exclamation mark.
    """
    names = ("all_special_ids", "all_special_tokens")
    tokens = dict(zip(*(getattr(tokenizer, name, []) for name in names), strict=True))
    added = getattr(tokenizer, "added_tokens_decoder", {})
    tokens |= {number: str(token) for number, token in added.items() if token.special}
    unknown = getattr(tokenizer, "unk_token_id", None)
    return {number for number, token in tokens.items() if len(token.strip()) > 1 and number != unknown}


def _leading_special_tokens(tokenizer: Any, text: str) -> tuple[int, ...]:
    """The special tokens that the tokenizer puts before `text`, which must have content tokens."""
    probe = tokenizer(text, return_special_tokens_mask=True, verbose=False, **_as_text(tokenizer))
    mask = probe["special_tokens_mask"]
    return tuple(probe["input_ids"][: mask.index(0) if 0 in mask else 0])


def _decoded(tokenizer: Any, ids: Sequence[int]) -> tuple[str, list[tuple[int, int]]]:
    """The text that the tokens decode to, and their spans; tokens that share a character have the same span."""

    def decode(first: int, last: int) -> str:
        return str(tokenizer.decode(ids[first:last], skip_special_tokens=False, clean_up_tokenization_spaces=False))

    text, spans = "", list[tuple[int, int]]()
    before, done = 0, 0  # previous tokens are decoded again with the next ones, since decoding may drop a first space
    for end in range(1, len(ids) + 1):
        known, now = decode(before, done), decode(before, end)
        if end < len(ids) and (len(now) <= len(known) or now.endswith("\ufffd")):
            continue  # in the middle of a character
        spans += [(len(text), len(text) + max(0, len(now) - len(known)))] * (end - done)
        text += now[len(known) :]
        before, done = done, end
    return text, spans


def positions_of(model: Any) -> int:
    """The number of positions that a model has; 0 if its config names none."""
    config = model.config.get_text_config()
    return getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None) or 0


def check_fits(model: Any, texts: Iterable[TokenizedText]) -> None:
    """Check that the model has embeddings and positions for all tokens of the texts.

    Raises
    ------
    UserError: a token id is beyond the model's embeddings, or a text is longer than its positions.
    """
    rows, positions = model.get_input_embeddings().weight.shape[0], positions_of(model)
    for text in texts:
        if text.ids and max(text.ids) >= rows:
            raise UserError(
                f"params.yaml: model.name: the tokenizer gives the token {max(text.ids)} (text {text.text_id}), but "
                f"{type(model).__name__} has embeddings of 0 to {rows - 1} only; check that its tokenizer belongs to it"
            )
        if 0 < positions < len(text.ids):
            raise UserError(
                f"params.yaml: corpus.max_tokens: a text has {len(text.ids)} tokens, {text.special} special among "
                f"them, but {type(model).__name__} has only {positions} positions (its config.json); allowed: at "
                f"most {positions - text.special}"
            )


def by_length(texts: Sequence[TokenizedText]) -> list[TokenizedText]:
    """The texts sorted by (length, text_id), so that neighbours have similar lengths."""
    return sorted(texts, key=lambda text: (len(text.ids), text.text_id))


def batches(
    texts: Sequence[TokenizedText], batch_tokens: int, most_padding: float = MOST_PADDING
) -> list[list[TokenizedText]]:
    """Cut `texts` (in `by_length` order) into batches of at most `batch_tokens` tokens with little padding."""
    cuts = _cut([len(text.ids) for text in texts], batch_tokens, most_padding)
    return [list(texts[first:end]) for first, end in pairwise(cuts)]


def _cut(lengths: Iterable[int], batch_tokens: int, most_padding: float = MOST_PADDING) -> list[int]:
    """The boundaries of batches of texts of these lengths (ascending)."""
    cuts, count, real, number = [0], 0, 0, 0
    for number, length in enumerate(lengths):
        padded = (count + 1) * length
        if count and (padded > batch_tokens or padded > (1 + most_padding) * (real + length)):
            cuts.append(number)
            count = real = 0
        count, real = count + 1, real + length
    return [*cuts, number + 1] if count else cuts


class TokenizedTexts:
    """The tokenized texts of a corpus, by number, in 4 bytes per token (a list of `TokenizedText` takes about 40).

    Parameters
    ----------
    frame: one row per text: `text_id`, `token_ids` (content tokens, `List(Int32)`) and any other columns, such as
        `language` and `split`. Texts without content tokens are dropped.
    special: ids that the tokenizer puts before every text.

    Attributes
    ----------
    frame: the remaining rows, with the number of content tokens as `tokens`.
    lengths: the column `tokens`, int64 `[texts]`.
    """

    def __init__(self, frame: pl.DataFrame, special: Sequence[int] = ()) -> None:
        tokens = pl.col("token_ids").list.len().cast(pl.Int64)
        self.frame = frame.with_columns(tokens=tokens).filter(pl.col("tokens") > 0)
        self.special = tuple(special)
        self.lengths = self.frame["tokens"].to_torch()

    def __len__(self) -> int:
        return len(self.frame)

    def __getitem__(self, numbers: Sequence[int]) -> list[TokenizedText]:
        rows = self.frame.select("text_id", "token_ids")[numbers].rows()
        return [TokenizedText(text_id, (*self.special, *ids), len(self.special)) for text_id, ids in rows]

    def __iter__(self) -> Iterator[TokenizedText]:
        for first in range(0, len(self), _CHUNK):
            yield from self[range(first, min(first + _CHUNK, len(self)))]

    def codes(self, languages: Sequence[str]) -> Tensor:
        """The position of each text's language in `languages`, int64 `[texts]`."""
        return codes(self.frame["language"], languages)

    def batches(self, batch_tokens: int, numbers: Sequence[int] | None = None) -> list[list[int]]:
        """Cut the texts, or those with the given numbers, into batches like `babelscope.models.tokens.batches`.

        Returns
        -------
        The numbers of each batch's texts, in `by_length` order.
        """
        rows = self.frame.with_row_index("number").select("number", "text_id", "tokens")
        rows = (rows if numbers is None else rows[numbers]).sort("tokens", "text_id")
        order, lengths = rows["number"].to_list(), (rows["tokens"] + len(self.special)).to_list()
        return [order[first:end] for first, end in pairwise(_cut(lengths, batch_tokens))]


def codes(language: pl.Series, languages: Sequence[str]) -> Tensor:
    """The position of each value in `languages`, int64."""
    return language.cast(pl.Enum(languages)).to_physical().cast(pl.Int64).to_torch()


def tokenize_corpus(tokenizer: Any, corpus: pl.DataFrame, max_tokens: int) -> TokenizedTexts:
    """Tokenize the texts of `corpus` (`text_id`, `text`, and any other columns) like `tokenize`."""
    parts = [
        pl.Series([ids[:max_tokens] for ids in content_ids(tokenizer, part["text"].to_list())], dtype=pl.List(pl.Int32))
        for part in corpus.iter_slices(_CHUNK)
    ]
    token_ids = pl.concat(parts) if parts else pl.Series(dtype=pl.List(pl.Int32))
    frame = corpus.with_columns(token_ids=token_ids).filter(pl.col("token_ids").list.len() > 0)
    special = _leading_special_tokens(tokenizer, frame["text"][0]) if len(frame) else ()
    return TokenizedTexts(frame.drop("text"), special)


def random_texts(tokenizer: Any, embeddings: int, tokens: int, length: int, seed: int) -> TokenizedTexts:
    """Sequences of `length` tokens drawn uniformly from the vocabulary, with at least `tokens` tokens in total.

    Special tokens and those beyond the model's `embeddings` are left out of the draw; the tokenizer's leading ones
    stand before every sequence.
    """
    special = _special_ids(tokenizer)
    vocabulary = np.array([number for number in range(min(len(tokenizer), embeddings)) if number not in special])
    drawn = np.random.default_rng(seed).choice(vocabulary, size=(-(-tokens // length), length))
    ids = [f"random-{number:07d}" for number in range(len(drawn))]
    frame = pl.DataFrame(
        {"text_id": ids, "token_ids": drawn.tolist()}, schema_overrides={"token_ids": pl.List(pl.Int32)}
    )
    probe = tokenizer.decode(drawn[0].tolist())
    return TokenizedTexts(frame, _leading_special_tokens(tokenizer, probe))


def pad(batch: Sequence[TokenizedText]) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask `[batch, longest]` (int64), padded on the right with zeros."""
    rows = [torch.tensor(text.ids, dtype=torch.int64) for text in batch]
    return pad_sequence(rows, batch_first=True), pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)


def texts_of(
    corpus: pl.DataFrame, tokenizer: Any, limit: int | None, max_tokens: int, *, cut: bool = False
) -> tuple[list[TokenizedText], list[str]]:
    """Texts of about `limit` tokens per language (see `within`), in `by_length` order, and the language of each.

    `corpus`: `text_id`, `language`, `text`. `max_tokens`: of a text.
    """
    if limit is not None:  # every text has a token
        corpus = corpus.sort("text_id").group_by("language", maintain_order=True).head(limit)
    language = dict(corpus.select("text_id", "language").iter_rows())
    ready = tokenize(tokenizer, corpus["text_id"].to_list(), corpus["text"].to_list(), max_tokens)
    texts = by_length(within(ready, language, limit, cut=cut))
    return texts, [language[text.text_id] for text in texts]


def within(
    texts: Sequence[TokenizedText], language: Mapping[str, str], limit: int | None, *, cut: bool = False
) -> list[TokenizedText]:
    """Take texts of each language, in the order of their ids (hashes), until they have `limit` content tokens.

    `language` maps a text's id to its language. If `limit` is None, all texts are taken. `cut`: whether the last text
    is cut, so that a language has no more than `limit` tokens.
    """
    taken: Counter[str] = Counter()
    chosen = []
    for text in sorted(texts, key=lambda text: text.text_id):
        left = text.content_tokens if limit is None else limit - taken[language[text.text_id]]
        if limit is None or left > 0:
            taken[language[text.text_id]] += text.content_tokens
            chosen.append(replace(text, ids=text.ids[: text.special + left]) if cut else text)
    return chosen
