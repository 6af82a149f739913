"""Stage `steer`: generate from the same prompts with each language's features amplified; does the language change?"""

import functools
import logging
import shutil
from pathlib import Path
from typing import Any

import polars as pl

from babelscope import config
from babelscope.core import stage
from babelscope.core.errors import UserError
from babelscope.core.files import read_table, write_atomically, write_json
from babelscope.core.fingerprint import dvc_md5, fingerprint
from babelscope.core.progress import Progress
from babelscope.core.resume import read_part, scratch

CORPUS, FEATURES, SAES = Path("data/corpus/texts.parquet"), Path("data/scores/features.parquet"), Path("data/sae")
COUNTS, OUT = Path("data/counts"), Path("data/steer/generations.parquet")
SCHEMA = {"language": pl.String, "strength": pl.Float64, "control": pl.Int32}
log = logging.getLogger(__name__)


def main() -> None:
    params = config.load()
    section = params.steer
    import torch
    from safetensors.torch import save_file

    from babelscope.corpus.lid import FastText
    from babelscope.models import hardware, loading, matmul
    from babelscope.steering import generation

    device = hardware.prepare(params.hardware)
    lid = FastText()
    labels, refused = lid.match(params.languages)
    for language, reason in refused.items():
        log.warning("%s: not steered, its success could not be judged: %s", language, reason)
    label = {language: code for code, language in labels.items()}
    tokenizer = loading.load_tokenizer(params.model)
    prompts = first_tokens(tokenizer, params)
    special = len(prompts[0]) - section.prompt_tokens
    added = directions(params, list(label))
    vectors = sorted({key for table in added.values() for key in table}, key=lambda key: (str(key[0]), str(key[1])))
    order = [name for name in label if any(key[0] == name for key in vectors)]
    draws = [None, 1] if section.control else [None]
    groups = [(None, 0.0, None)] + [(n, s, c) for s in section.strengths for n in order for c in draws]
    rows = [(*group, number) for group in groups for number in range(len(prompts))]

    knobs = params.model_dump(include={"hookpoints", "languages", "model", "seed", "steer"})
    knobs |= {"ratio": params.score.ratio}
    inputs = {str(path): dvc_md5(path) for path in (CORPUS, FEATURES, COUNTS, SAES)}
    keep = scratch(fingerprint("steer", knobs, inputs))
    model = loading.load_model(params.model, section.dtype).to(device)
    matmul.use_in(model)
    parts: list[dict[str, Any]] = []
    with Progress("steer", len(rows), "texts") as progress:
        for first in range(0, len(rows), section.batch_rows):
            batch = rows[first : first + section.batch_rows]
            file = keep / f"from-{first:06d}.safetensors"
            if (part := read_part(file)) is not None:
                parts.append(part)
                progress.skip(len(batch))
                continue
            ids = torch.tensor([prompts[number] for *_, number in batch])
            pushes = {
                hookpoint: torch.stack([s * table.get((n, c), torch.zeros(width)) for n, s, c, _ in batch])
                for hookpoint, table in added.items() if table
                for width in [len(next(iter(table.values())))]
            }  # fmt: skip
            generated = generation.generate(
                model, ids, pushes, new_tokens=section.new_tokens, temperature=section.temperature,
                seed=params.seed, special=special, first_row=first,
            )  # fmt: skip
            nll, distinct = generation.fluency(model, ids, generated)
            part = {"ids": ids, "generated": generated.contiguous(), "nll": nll, "distinct": distinct}
            write_atomically(file, functools.partial(save_file, part))
            parts.append(part)
            progress.update(len(batch))
    whole = {key: torch.cat([part[key] for part in parts]) for key in ("ids", "generated", "nll", "distinct")}
    texts = tokenizer.batch_decode(whole["generated"], skip_special_tokens=True)
    judged = generation.judge(
        pl.DataFrame([row[:3] for row in rows], schema=SCHEMA, orient="row").with_columns(
            prompt=pl.Series(tokenizer.batch_decode(whole["ids"], skip_special_tokens=True)),
            text=pl.Series(texts, dtype=pl.String),
            predicted=lid.predict(texts)["predicted"],
            nll=pl.Series(whole["nll"].numpy()),
            distinct_2=pl.Series(whole["distinct"].numpy()),
        ),
        label, section.min_distinct, section.max_nll,
    )  # fmt: skip
    write_atomically(OUT, judged.write_parquet)
    numbers = generation.figures(judged, label, section.min_distinct, section.max_nll)
    write_json(Path("metrics/steer.json"), numbers)
    shutil.rmtree(keep, ignore_errors=True)
    keys = ("success", "called", "nll", "distinct_2")
    stage.table(
        ["language", "strength", "success", "called", "NLL (nats/token)", "distinct-2"],
        [
            [name, f"{numbers[f'strength/{name}']:g}", *(f"{numbers[f'{key}/{name}']:.2f}" for key in keys)]
            for name in order
        ],
    )


def first_tokens(tokenizer: Any, params: config.Config) -> list[list[int]]:
    """The first tokens of held-out texts in `steer.prompt_language`: the same for every language that is amplified.

    Each begins with the special tokens that the tokenizer puts first, as in every other pass over the model.
    """
    from babelscope.models.tokens import tokenize

    section = params.steer
    corpus = read_table(CORPUS).filter(pl.col("split") == "eval", pl.col("language") == section.prompt_language)
    texts = tokenize(tokenizer, corpus["text_id"].to_list(), corpus["text"].to_list(), section.prompt_tokens)
    distinct = list(dict.fromkeys(text.ids for text in texts if text.own == section.prompt_tokens))
    if len(distinct) < section.prompts:
        raise UserError(f"params.yaml: steer.prompts: {section.prompts} wanted, but the held-out texts in "
                        f"{section.prompt_language!r} begin in {len(distinct)} ways")  # fmt: skip
    return [list(ids) for ids in distinct[: section.prompts]]


def directions(params: config.Config, languages: list[str]) -> dict[str, dict[tuple[str | None, int | None], Any]]:
    """By hookpoint and (language, draw): what strength 1 adds; draw 1 is the control of as many random units."""
    from babelscope import sae
    from babelscope.ablation import controls
    from babelscope.steering import generation

    features = read_table(FEATURES).filter(kind="sae")
    found: dict[str, dict[tuple[str | None, int | None], Any]] = {}
    for hookpoint in params.hookpoints:
        mine = features.filter(pl.col("hookpoint") == hookpoint)
        if mine.is_empty():
            continue
        dictionary = sae.load(SAES, hookpoint)
        counts = read_table(COUNTS / f"{hookpoint}.parquet")
        sizes = read_table(COUNTS / f"{hookpoint}.totals.parquet")
        totals = dict(sizes.select("language", "tokens").iter_rows())
        found[hookpoint] = {}
        for language in languages:
            units = mine.filter(pl.col("language") == language)["unit"].to_list()
            there = counts.filter(pl.col("language") == language)
            mean = {unit: total / totals[language] for unit, total in there.select("unit", "sum").iter_rows()}
            sets: dict[int | None, list[int]] = {None: units}
            if params.steer.control and units:
                [sets[1]] = controls.matched(
                    counts, sizes, features, hookpoint, language, ratio=params.score.ratio, draws=1, seed=params.seed
                )
            for draw, members in sets.items():
                if members:
                    means = [mean.get(unit, 0.0) for unit in members]
                    found[hookpoint][language, draw] = generation.direction(dictionary, members, means)
        del dictionary  # before the next one is read: it may be as large as the model
    return found


if __name__ == "__main__":
    stage.run(main)
