"""Removal: the model answers in the wrong language, and what marks that language is taken out of its states.

Along the language's direction, states keep a component up to the mean of the other languages. A component of 0 would be
far from every language where the states have a large common mean, and would harm all of them.

Measured as in the Language Confusion Benchmark (Marchisio et al. 2024, arXiv 2406.20052), on held-out prompts of every
other language that follow a line in the removed one, which provokes answers in it.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import polars as pl
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from babelscope.corpus import lid
from babelscope.models import hookpoints as hooks
from babelscope.models.nll import target_count, text_nll
from babelscope.models.tokens import TokenizedText, batches, by_length, pad
from babelscope.models.top_tokens import TopTokens
from babelscope.steering import generation
from babelscope.steering.prompts import Lines
from babelscope.steering.vectors import Vectors

NONE = "none"
# A language whose training texts have a larger share of Latin letters among their letters has no word-level pass rate.
_LATIN_SHARE = 0.5
COLUMNS = {"method": pl.String, "language": pl.String, "prompts": pl.Int64, "line_pass": pl.Float64,
           "word_pass": pl.Float64, "in_removed": pl.Float64, "nll": pl.Float64}  # fmt: skip


class Direction(NamedTuple):
    """A unit vector `[d]`, and the place at which a component along it that is above `level` falls to `level`."""

    place: str
    unit: Tensor
    level: float


def directions(
    vectors: Vectors, chosen: pl.DataFrame, language: str, others: dict[str, Tensor]
) -> dict[str, Direction | None]:
    """By method, the direction of `language` at the method's place; `none` removes nothing.

    Parameters
    ----------
    chosen: `method`, `place`: the settings of the development.
    others: by place, the mean over the other languages of their mean states, float32 `[d]`: it has the level.
    """
    found: dict[str, Direction | None] = {NONE: None}
    for method, place in chosen.unique("method", maintain_order=True).select("method", "place").iter_rows():
        vector = vectors.get(method, {}).get(place, {}).get(language)
        if vector is not None:
            unit = F.normalize(vector, dim=0)
            found[method] = Direction(place, unit, float(others[place] @ unit))
    return found


def measure(
    top: TopTokens, identifier: lid.FastText, label: dict[str, str], lines: Lines, corpus: pl.DataFrame, removed: str,
    methods: dict[str, Direction | None], *, prompts: int, new_tokens: int, texts: dict[str, list[TokenizedText]],
    batch_tokens: int, batch_rows: int,
) -> pl.DataFrame:  # fmt: skip
    """The pass rates of every method and language, and the NLL of held-out texts after the removal.

    Parameters
    ----------
    top: of the model.
    identifier, label: fastText and its label of each language.
    lines: makes the prompts.
    corpus: `language`, `split`, `text_id`, `group`, `text`.
    removed: the language that is removed.
    methods: see `directions`.
    prompts: held-out prompts per language (fewer if a language has fewer).
    new_tokens: tokens of an answer, greedily generated.
    texts: held-out texts by language.
    batch_tokens: tokens in one pass over them.
    batch_rows: answers at once.

    Returns
    -------
    `COLUMNS`: `line_pass` (LPR), share of the answers all of whose lines fastText identifies as the prompt's language;
    `word_pass` (WPR), share of these without a word in Latin letters (null: the language is written in them, or no
    answer passes); `in_removed`, share of the answers identified as the removed language; `nll`, nats per token of
    `texts`. For the removed language itself only `nll`.
    """
    first = corpus.filter(split="train", language=removed).sort("text_id")["text"].to_list()
    held_out, rows = corpus.filter(split="eval").sort("text_id"), []
    asked = {
        language: lines.prompts(held_out.filter(language=language))[:prompts]
        for language in texts if language != removed and language in label
    }  # fmt: skip
    ids = [
        lines.after(prompt, first[number : number + 1]) for own in asked.values() for number, prompt in enumerate(own)
    ]
    special = max((len(prompt.special) for own in asked.values() for prompt in own), default=0)
    latin = _latin(corpus)
    for method, direction in methods.items():
        generated = _answers(top, ids, special, direction, new_tokens, batch_rows)
        answers = iter(lines.tokenizer.batch_decode(generated, skip_special_tokens=True))
        for language, own in texts.items():
            nll = _nll(top, own, direction, batch_tokens)
            mine = [next(answers) for _ in asked.get(language, ())]
            if not mine:
                rows.append((method, language, 0, None, None, None, nll))
                continue
            passes = [_passes(identifier, answer, label[language]) for answer in mine]
            others = identifier.predict(mine)["predicted"] == label.get(removed, removed)
            words = [not _has_latin(answer) for answer, passed in zip(mine, passes, strict=True) if passed]
            word = None if latin[language] > _LATIN_SHARE or not words else sum(words) / len(words)
            rows.append((method, language, len(mine), sum(passes) / len(mine), word, float(others.mean()), nll))  # type: ignore[arg-type]
    return pl.DataFrame(rows, schema=COLUMNS, orient="row")


def figures(table: pl.DataFrame, removed: str) -> dict[str, float]:
    """Means over the languages but the removed one: `removal/<method>/line_pass`, `word_pass`, `in_removed`, `nll`.

    `removal/<method>/nll_removed` is the NLL of the removed language's own texts.
    """
    numbers: dict[str, float] = {}
    for (method,), rows in table.group_by("method", maintain_order=True):
        others = rows.filter(pl.col("language") != removed)
        values = {key: others[key].mean() for key in ("line_pass", "word_pass", "in_removed", "nll")}
        values["nll_removed"] = rows.filter(language=removed)["nll"].mean()
        numbers |= {f"removal/{method}/{key}": float(value) for key, value in values.items() if value is not None}  # type: ignore[arg-type]
    return numbers


def _answers(
    top: TopTokens, ids: Sequence[Sequence[int]], special: int, direction: Direction | None, new_tokens: int, rows: int
) -> list[list[int]]:
    """The greedy answers to `ids`, which begin with `special` special tokens, `rows` at once."""
    order = sorted(range(len(ids)), key=lambda number: len(ids[number]))  # prompts of one length need no padding
    found: dict[int, list[int]] = {}
    for start in range(0, len(order), rows):
        batch = order[start : start + rows]
        generated = generation.generate(
            top, [ids[number] for number in batch], _changes(top, direction), special=special,
            new_tokens=new_tokens, temperature=[0.0] * len(batch), seeds=[[0]] * len(batch),
        )  # fmt: skip
        found |= zip(batch, generated.tolist(), strict=True)
    return [found[number] for number in range(len(ids))]


def _changes(top: TopTokens, direction: Direction | None) -> dict[str, generation.Change]:
    if direction is None:
        return {}
    unit = direction.unit.unsqueeze(0).to(hooks.device_of(top.model))
    return {direction.place: generation.Change(removed=unit, level=direction.level)}


def _passes(identifier: lid.FastText, answer: str, label: str) -> bool:
    """Whether fastText identifies every line as the language; an empty answer does not pass."""
    found = [line for line in answer.splitlines() if line.strip()]
    return bool(found) and (identifier.predict(found)["predicted"] == label).all()


def _has_latin(text: str) -> bool:
    return bool(pl.Series([text]).str.contains(r"\p{Latin}{2,}")[0])


def _latin(corpus: pl.DataFrame) -> dict[str, float]:
    """The share of Latin letters among the letters of each language's training texts."""
    count = [pl.col("text").str.count_matches(letters).sum() for letters in (r"\p{Latin}", r"\p{L}")]
    shares = corpus.filter(split="train").group_by("language").agg((count[0] / count[1]).alias("share"))
    return dict(shares.iter_rows())


@torch.inference_mode()
def _nll(top: TopTokens, texts: list[TokenizedText], direction: Direction | None, batch_tokens: int) -> float:
    total = 0.0
    device, special = hooks.device_of(top.model), max((text.special for text in texts), default=1)

    def edit(x: Tensor, change: generation.Change) -> Tensor:
        stays = max(special, 1)  # as in `generation.generate`
        return torch.cat([x[:, :stays], change(x[:, stays:])], dim=1)

    edits = {place: partial(edit, change=change) for place, change in _changes(top, direction).items()}
    with hooks.editing(top.model, edits):
        for batch in batches(by_length(texts), batch_tokens):
            ids, mask = (part.to(device) for part in pad(batch))
            skipped = torch.tensor([text.special for text in batch], device=device)
            total += float(text_nll(top.model, ids, mask, skipped).sum())
    return total / max(1, sum(map(target_count, texts)))
