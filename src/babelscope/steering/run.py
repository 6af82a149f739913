"""Stage `steer`: generate from the same prompts with each language's features amplified; does the language change?"""

import logging
from typing import Any

import polars as pl
import torch
from torch import Tensor

from babelscope import sae
from babelscope.ablation.conditions import matched
from babelscope.config import Config
from babelscope.core import resume, stage
from babelscope.core.errors import UserError
from babelscope.core.files import read_table, write_atomically, write_json
from babelscope.core.paths import Paths
from babelscope.corpus import lid
from babelscope.models import hardware, loading, matmul
from babelscope.models.tokens import tokenize
from babelscope.steering import generation, success

log = logging.getLogger(__name__)

# By (language, number of the control draw or None): a vector `[d]`.
Directions = dict[tuple[str | None, int | None], Tensor]


def run(params: Config, paths: Paths) -> None:
    """Generate with every language and strength; write `paths.generations` and the stage's metrics."""
    section, device = params.steer, hardware.prepare(params.hardware)
    identifier = lid.FastText()
    labels, refused = identifier.match(params.languages)
    for language, reason in refused.items():
        log.warning("%s: not steered, since its success cannot be judged: %s", language, reason)
    label = {language: code for code, language in labels.items()}
    tokenizer = loading.load_tokenizer(params.model)
    prompts = first_tokens(tokenizer, params, paths)
    added = directions(params, paths, list(label))
    steered = [language for language in label if any((language, None) in vectors for vectors in added.values())]
    draws = [None, 1] if section.control else [None]
    groups = [(None, 0.0, None)] + [(n, s, draw) for s in section.strengths for n in steered for draw in draws]
    rows = [(*group, prompt) for group in groups for prompt in prompts]
    model = loading.load_model(params.model, section.dtype).to(device)
    matmul.use_in(model)

    def generate(numbers: range) -> dict[str, Tensor]:
        batch = rows[numbers.start : numbers.stop]
        ids = torch.tensor([prompt for *_, prompt in batch])
        vectors = {}
        for hookpoint, table in added.items():
            nothing = torch.zeros_like(next(iter(table.values())))
            vectors[hookpoint] = torch.stack([s * table.get((name, draw), nothing) for name, s, draw, _ in batch])
        generated = generation.generate(
            model, ids, vectors, new_tokens=section.new_tokens, temperature=section.temperature,
            seed=params.seed, special=len(prompts[0]) - section.prompt_tokens, first_row=numbers.start,
        )  # fmt: skip
        nll, distinct = generation.fluency(model, ids, generated)
        return {"ids": ids, "generated": generated.contiguous(), "nll": nll, "distinct": distinct}

    depends = params.model_dump(include={"hookpoints", "languages", "model", "seed", "steer"})
    depends["ratio"] = params.score.ratio
    starts = range(0, len(rows), section.batch_rows)
    batches = [range(first, min(first + section.batch_rows, len(rows))) for first in starts]
    with resume.kept("steer", depends, [paths.texts, paths.features, paths.all_counts, paths.saes]) as folder:
        parts = list(resume.parts("steer", batches, generate, folder))
        whole = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        texts = tokenizer.batch_decode(whole["generated"], skip_special_tokens=True)
        schema = {"language": pl.String, "strength": pl.Float64, "control": pl.Int32}
        judged = success.judge(
            pl.DataFrame([row[:3] for row in rows], schema=schema, orient="row").with_columns(
                prompt=pl.Series(tokenizer.batch_decode(whole["ids"], skip_special_tokens=True)),
                text=pl.Series(texts, dtype=pl.String),
                predicted=identifier.predict(texts)["predicted"],
                nll=pl.Series(whole["nll"].numpy()),
                distinct_2=pl.Series(whole["distinct"].numpy()),
            ),
            label, section.min_distinct, section.max_nll,
        )  # fmt: skip
        figures = success.figures(judged, label, section.min_distinct, section.max_nll)
        write_atomically(paths.generations, judged.write_parquet)
        write_json(paths.metrics("steer"), figures)
    keys = ("success", "called", "nll", "distinct_2")
    stage.table(
        ["language", "strength", "success", "called", "NLL (nats/token)", "distinct-2"],
        [[n, f"{figures[f'strength/{n}']:g}", *(f"{figures[f'{key}/{n}']:.2f}" for key in keys)] for n in steered],
    )


def first_tokens(tokenizer: Any, params: Config, paths: Paths) -> list[list[int]]:
    """The prompts of all languages: the first tokens of held-out texts in `steer.prompt_language`.

    Each begins with the tokenizer's leading special tokens, as in every other pass over the model.
    """
    section = params.steer
    corpus = read_table(paths.texts).filter(split="eval", language=section.prompt_language)
    texts = tokenize(tokenizer, corpus["text_id"].to_list(), corpus["text"].to_list(), section.prompt_tokens)
    distinct = list(dict.fromkeys(text.ids for text in texts if text.content_tokens == section.prompt_tokens))
    if len(distinct) < section.prompts:
        raise UserError(f"params.yaml: steer.prompts: {section.prompts} wanted; allowed: at most {len(distinct)}, the "
                        f"number of different beginnings of held-out texts in {section.prompt_language!r}")  # fmt: skip
    return [list(ids) for ids in distinct[: section.prompts]]


def directions(params: Config, paths: Paths, languages: list[str]) -> dict[str, Directions]:
    """By hookpoint with features: the vectors that strength 1 adds; draw 1 is the control of random units."""
    features = read_table(paths.features).filter(kind="sae")
    found: dict[str, Directions] = {}
    for hookpoint in params.hookpoints:
        selected = features.filter(hookpoint=hookpoint)
        if selected.is_empty():
            continue
        dictionary = sae.load(paths.saes, hookpoint)
        counts, totals = read_table(paths.counts(hookpoint)), read_table(paths.totals(hookpoint))
        tokens = dict(totals.select("language", "tokens").iter_rows())
        vectors: Directions = {}
        for language in languages:
            units = selected.filter(language=language)["unit"].to_list()
            sums = dict(counts.filter(language=language).select("unit", "sum").iter_rows())
            sets: dict[int | None, list[int]] = {None: units}
            if params.steer.control and units:
                [sets[1]] = matched(
                    counts, totals, features, hookpoint, language, ratio=params.score.ratio, draws=1, seed=params.seed
                )
            for draw, members in sets.items():
                if members:
                    means = [sums.get(unit, 0.0) / tokens[language] for unit in members]
                    vectors[language, draw] = generation.direction(dictionary, members, means)
        if vectors:
            found[hookpoint] = vectors
        del dictionary  # before the next one is read: it may be as large as the model
    return found
