"""Select the sample from all texts: cleaning, splitting, and filling token budgets."""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence

import polars as pl

from babelscope.config.schema import Corpus
from babelscope.core.errors import UserError
from babelscope.corpus import groups

log = logging.getLogger(__name__)

COLUMNS = ("text_id", "language", "split", "group", "source", "text")
Tokenize = Callable[[list[str]], list[list[int]]]

# The evaluation split gets this multiple of its share of the budgets, since chance and dropped texts affect the smaller
# split more. With 12,000 + 1,500 tokens, it gets 1/6 of the groups instead of 1/9.
_EVAL_GENEROSITY = 1.5
# Texts tokenized at once.
_CHUNK = 256

# Invisible characters: controls, private use, bidirectional marks, soft hyphen, byte order mark. Joiners stay: Persian
# and Indic languages are spelled with them.
_INVISIBLE = r"[\p{Cc}\p{Co}\x{ad}\x{200e}\x{200f}\x{202a}-\x{202e}\x{2060}\x{2066}-\x{2069}\x{feff}&&[^\s]]"


def sample(
    texts: pl.DataFrame,
    languages: Sequence[str],
    section: Corpus,
    seed: int,
    tokenize: Tokenize,
    advance: Callable[[int], None] = lambda languages: None,
    taken: pl.DataFrame | None = None,
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Clean `texts`, split them by parallel group, and draw texts of each language until its token budgets are full.

    A group's split and its position in the draw depend only on a hash of (seed, group). Parallel texts are therefore
    often drawn together, and the other languages matter only if one of their texts joins two groups. A language that
    cannot fill a budget gets all of its texts, with a warning. Texts whose first max_tokens tokens are equal are one
    text (see `merge`).

    Parameters
    ----------
    texts: language, group (None: the text is a group of its own), source, text; any order, repetitions allowed.
    languages: the languages to draw, in the order of the result.
    section: min_characters, max_tokens, and the budgets train_tokens and eval_tokens (tokens per language).
    tokenize: returns the ids of the content tokens in each text.
    advance: called with 1 after each language.
    taken: an earlier sample (text_id, split) of other languages, whose texts are among `texts`. Texts that are parallel
        to one of its texts, but fall in the other split, are not drawn.

    Returns
    -------
    The sample (text_id, language, split, group, source, text), ordered by language, split and draw; and its totals
    (language, split, source, texts, tokens) with a row for each language, split and source, zeros included, and at most
    max_tokens tokens counted per text.

    Raises
    ------
    UserError: a language has no text left after cleaning, or none in one of the splits.
    """
    ready = clean(texts, section.min_characters)
    for language in languages:
        if ready.filter(pl.col("language") == language).is_empty():
            count, rest = texts.filter(pl.col("language") == language).height, ready["language"].unique().sort()
            raise UserError(
                f"params.yaml: languages: no text of {language!r} is left: none of its {count} texts has "
                f"corpus.min_characters = {section.min_characters} characters and occurs in this language only; "
                f"languages with texts: {', '.join(rest) or 'none'}"
            )
    used = UsedTokens(tokenize, section.max_tokens)
    if taken is not None:
        used.count(ready.join(taken, on="text_id", how="semi"))
    chosen = _draw(ready, languages, section, seed, used, taken, advance)
    # Tokenizing may show that texts are equal in the tokens used. They are merged, and the draw is repeated, until no
    # two are equal.
    while (merged := merge(ready, used.digests)).height < ready.height:
        ready = merged
        chosen = _draw(ready, languages, section, seed, used, taken)
    sources = texts["source"].unique().sort().to_list()
    totals = []
    for language, name, budget in _parts(languages, section):
        part = chosen.filter(pl.col("language") == language, pl.col("split") == name)
        tokens = int(part["tokens"].sum())
        if not tokens:
            raise UserError(
                f"params.yaml: languages: {language!r} has no text for the {name} split (of {ready.height} texts "
                "of all languages); add texts, or lower corpus.min_characters"
            )
        if tokens < budget:
            log.warning("%s: only %d of %d %s tokens (%d texts)", language, tokens, budget, name, part.height)
        for source in sources:
            rows = part.filter(source=source)
            totals.append((language, name, source, rows.height, int(rows["tokens"].sum())))
    schema = dict.fromkeys(("language", "split", "source"), pl.String) | dict.fromkeys(("texts", "tokens"), pl.Int64)
    return chosen.select(COLUMNS), pl.DataFrame(totals, schema=schema, orient="row")


class UsedTokens:
    """The first `max_tokens` tokens of each text; `count` tokenizes a text the first time that it meets it.

    Attributes
    ----------
    digests: text_id -> a hash of the tokens used, for every text counted so far that has two or more.
    """

    def __init__(self, tokenize: Tokenize, max_tokens: int) -> None:
        self._tokenize, self._max_tokens = tokenize, max_tokens
        self._counts: dict[str, int] = {}
        self.digests: dict[str, str] = {}

    def count(self, texts: pl.DataFrame) -> pl.Series:
        """The number of used tokens in each of `texts` (text_id, text)."""
        new = [row for row in texts.select("text_id", "text").iter_rows() if row[0] not in self._counts]
        for (text_id, _), ids in zip(new, self._tokenize([text for _, text in new]) if new else [], strict=True):
            cut = ids[: self._max_tokens]
            self._counts[text_id] = len(cut)
            if len(cut) >= 2:  # shorter texts are never drawn, and may be equal only because the token is unknown
                self.digests[text_id] = _digest(*map(str, cut))
        return pl.Series("tokens", [self._counts[text_id] for text_id in texts["text_id"]], dtype=pl.Int64)


def merge(texts: pl.DataFrame, digests: Mapping[str, str]) -> pl.DataFrame:
    """Merge texts whose used tokens are equal, as `clean` merges texts that are equal as a whole.

    Of equal texts in one language one is kept, and their groups become one; equal texts in several languages are all
    dropped. `digests` maps text_id to a hash of the tokens used; texts without one stay as they are.
    """
    used = pl.col("text_id").replace(digests)
    return _one_of_each(groups.join(texts.with_columns(used=used), "used"), ["language", "used"], "used").drop("used")


def _one_of_each(texts: pl.DataFrame, same: Sequence[str], across: str) -> pl.DataFrame:
    """Keep one of the texts that are equal in the columns `same`, then drop all whose `across` still occurs twice."""
    first = texts.sort("text_id", "group", "source").unique(same, keep="first", maintain_order=True)
    return first.filter(pl.len().over(across) == 1)


def _parts(languages: Sequence[str], section: Corpus) -> list[tuple[str, str, int]]:
    """(language, split, budget in tokens) of every part of the sample, in order."""
    budgets = {"eval": section.eval_tokens, "train": section.train_tokens}
    return [(language, split, budget) for language in languages for split, budget in budgets.items()]


def _draw(
    ready: pl.DataFrame,
    languages: Sequence[str],
    section: Corpus,
    seed: int,
    used: UsedTokens,
    taken: pl.DataFrame | None,
    advance: Callable[[int], None] = lambda languages: None,
) -> pl.DataFrame:
    """The texts that fill the budgets, with `split` and `tokens`."""
    drawn = split(ready, eval_share(section.train_tokens, section.eval_tokens), seed)
    if taken is not None:
        drawn = apart(drawn, taken)
    parts = []
    for number, (language, name, budget) in enumerate(_parts(languages, section)):
        parts.append(fill(drawn.filter(pl.col("language") == language, pl.col("split") == name), budget, used))
        advance(number % 2)
    return pl.concat(parts)


def clean(texts: pl.DataFrame, min_characters: int) -> pl.DataFrame:
    """Normalise texts (Unicode's form C, one line, no invisible characters), merge equal ones, and add `text_id`.

    Texts shorter than `min_characters` are dropped, and so are texts that occur in several languages, which are names,
    untranslated or mislabelled.
    """
    text = pl.col("text").str.normalize("NFC").str.replace_all(_INVISIBLE, "").str.replace_all(r"\s+", " ")
    texts = texts.with_columns(text.str.strip_chars()).filter(pl.col("text").str.len_chars() >= min_characters)
    ids = [_digest(language, text) for language, text in texts.select("language", "text").iter_rows()]
    texts = texts.with_columns(text_id=pl.Series(ids, dtype=pl.String))
    texts = groups.join(texts.with_columns(pl.col("group").fill_null(pl.col("text_id"))))
    return _one_of_each(texts, ["text_id"], "text")


def eval_share(train_tokens: int, eval_tokens: int) -> float:
    """The share of groups in the evaluation split: 1.5 times its share of the budgets, at most a half."""
    return min(0.5, _EVAL_GENEROSITY * eval_tokens / (train_tokens + eval_tokens))


def split(texts: pl.DataFrame, share: float, seed: int) -> pl.DataFrame:
    """Add `split` ("eval" for about `share` of the groups, else "train"), and sort into the order of the draw.

    Both depend on a hash of (seed, group): the lowest `share` of its range is "eval", and the draw goes by its order.
    """
    names = texts["group"].unique().sort()
    hashes = pl.DataFrame({"group": names, "hash": [int(_digest(str(seed), group), 16) for group in names]},
                          schema={"group": pl.String, "hash": pl.UInt64})  # fmt: skip
    name = pl.when(pl.col("hash") < int(share * 2**64)).then(pl.lit("eval")).otherwise(pl.lit("train"))
    return texts.join(hashes, on="group").with_columns(split=name).sort("hash", "group", "text_id").drop("hash")


def apart(texts: pl.DataFrame, taken: pl.DataFrame) -> pl.DataFrame:
    """`texts` (with `group`, `split`) without groups that hold a text of `taken` (text_id, split) in the other split.

    `taken` was split without some of the languages, one of whose texts may have joined two of its groups.
    """
    held = texts.join(taken.select("text_id", taken="split"), on="text_id").filter(pl.col("taken") != pl.col("split"))
    return texts.join(held, on="group", how="anti", maintain_order="left")


def fill(texts: pl.DataFrame, budget: int, used: UsedTokens) -> pl.DataFrame:
    """The first `texts` that together hold at least `budget` used tokens (or all texts), with `tokens`.

    Texts of a single token are dropped, since nothing can be predicted within them. Texts are tokenized only until the
    budget is full.
    """
    taken = [texts.clear().with_columns(tokens=pl.lit(0, dtype=pl.Int64))]
    total = 0
    for chunk in texts.iter_slices(_CHUNK):
        chunk = chunk.with_columns(used.count(chunk)).filter(pl.col("tokens") >= 2)
        chunk = chunk.filter(total + pl.col("tokens").cum_sum() - pl.col("tokens") < budget)
        taken.append(chunk)
        total += int(chunk["tokens"].sum())
        if total >= budget:
            break
    return pl.concat(taken)


def _digest(*parts: str) -> str:
    """A hash of 16 hexadecimal digits (64 bits), the same on every machine and in every version."""
    return hashlib.blake2b("\x00".join(parts).encode(), digest_size=8).hexdigest()
