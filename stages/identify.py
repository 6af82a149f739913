"""Stage `identify`: which language a text is in, told from the units that fire, against fastText's identifier.

On the held-out split, and on the texts of another domain where `identify.also` names a folder.
"""

import functools
import logging
import shutil
from pathlib import Path
from typing import Any

import polars as pl

from babelscope import config
from babelscope.config import schema
from babelscope.config.values import expanded
from babelscope.core import stage
from babelscope.core.errors import UserError
from babelscope.core.files import read_part, read_table, scratch, write_atomically, write_json
from babelscope.core.fingerprint import dvc_md5, fingerprint
from babelscope.core.progress import Progress

CORPUS, FEATURES, SAES = Path("data/corpus/texts.parquet"), Path("data/scores/features.parquet"), Path("data/sae")
ACTIVATIONS, COUNTS, OUT = Path("data/activations"), Path("data/counts"), Path("data/identify")
BASELINE = "fasttext"
# Tokens encoded at once: bounds the memory.
CHUNK = 8192
log = logging.getLogger(__name__)


def main() -> None:
    params = config.load()
    from babelscope import sae
    from babelscope.corpus.lid import FastText
    from babelscope.identification import unit_totals
    from babelscope.models import hardware

    device = hardware.prepare(params.hardware)
    also = read_also(params)
    lid = FastText()
    features = read_table(FEATURES)
    owners, latents = {}, []
    for (kind, hookpoint), rows in features.group_by("kind", "hookpoint", maintain_order=True):
        counts = None
        if kind == "sae":
            latents.append(str(hookpoint))
            counts = read_table(COUNTS / f"{hookpoint}.parquet", columns=["unit", "language", "min_positive", "max"])
        owners[str(hookpoint)] = unit_totals.owned(rows, counts, params.languages)
    saes = sae.SAECache(SAES, latents, device)
    if not owners:
        log.warning("%s: no features, so only fastText identifies anything", FEATURES)

    corpus = read_table(CORPUS).filter(split="eval")
    held_out = unit_totals.Totals(len(corpus), owners, saes, device)
    # Neurons are stored nowhere, latents are not where `train.source` is `stream`.
    stored = [name for name in saes if params.train.source != "stream"]
    add_texts(held_out, corpus, [name for name in owners if name not in stored], params)
    add_held_out(held_out, corpus, stored)
    numbers = write("", corpus, held_out.totals, features, lid, params)
    for name in ("also", "also_confusion"):
        (OUT / f"{name}.parquet").unlink(missing_ok=True)
    if also is not None:
        there = unit_totals.Totals(len(also), owners, saes, device)
        add_texts(there, also, list(owners), params)
        numbers |= write("also", also, there.totals, features, lid, params)
    write_json(Path("metrics/identify.json"), numbers)


def read_also(params: config.Config) -> pl.DataFrame | None:
    """The texts of `identify.also`: of each language the first `also_texts` by text_id, which is a hash of the text."""
    from babelscope.corpus import hub, sampling, text_files

    also = params.identify.also
    if also is None:
        return None
    if isinstance(also, schema.Dataset):
        raw, [record] = hub.read([also], params.languages, key="identify.also")
        name = str(record["path"])
    else:
        if not expanded(also).is_dir():
            raise UserError(f"params.yaml: identify.also: no folder {also!r}")
        section = params.corpus.model_copy(update={"source": "files", "path": also, "packages": []})
        raw, name = text_files.read(section, params.languages), also
    texts = sampling.clean(raw, min_characters=1)
    chosen = texts.filter(pl.int_range(pl.len()).over("language") < params.identify.also_texts)
    lacking = [name for name in params.languages if name not in set(chosen["language"])]
    if lacking:
        raise UserError(f"params.yaml: identify.also: {name!r} has no text in {', '.join(lacking)}")
    return chosen.sort(pl.col("language").cast(pl.Enum(params.languages)), maintain_order=True)


def add_held_out(held_out: Any, corpus: pl.DataFrame, hookpoints: list[str]) -> None:
    """Read the stored activations of the split at `hookpoints`: no forward pass is needed."""
    from babelscope.activations.store import ActivationStore, place

    if not hookpoints:
        return
    number = corpus.select("text_id", text=pl.int_range(pl.len(), dtype=pl.Int64))
    table = read_table(ACTIVATIONS / "tokens.parquet").filter(split="eval").join(
        number, on="text_id", how="left", maintain_order="left"
    )  # fmt: skip
    if table["text"].null_count():
        raise UserError(f"{ACTIVATIONS / 'tokens.parquet'}: holds texts that {CORPUS} lacks; dvc repro extract")
    row, text = table["row"].to_torch(), table["text"].to_torch()
    with Progress("identify", len(row) * len(hookpoints), "tokens") as progress:
        for hookpoint in hookpoints:
            store = ActivationStore(place(ACTIVATIONS, held_out.encodes(hookpoint)))
            for first in range(0, len(row), CHUNK):
                part = slice(first, first + CHUNK)
                held_out.add(hookpoint, store.gather(row[part]), text[part])
                progress.update(len(row[part]))


def add_texts(there: Any, texts: pl.DataFrame, hookpoints: list[str], params: config.Config) -> None:
    """One forward pass over `texts` for `hookpoints`; from what each batch gave a killed run goes on."""
    if not hookpoints:
        return
    import torch
    from safetensors.torch import save_file

    from babelscope.models import forward, loading, tokens

    ids = [str(number) for number in range(len(texts))]
    tokenizer = loading.load_tokenizer(params.model)
    tokenized = tokens.tokenize(tokenizer, ids, texts["text"].to_list(), params.corpus.max_tokens)
    model = loading.load_model(params.model, params.extract.dtype).to(there.device)
    tokens.check_fits(model, tokenized)
    store_dtype = loading.DTYPES[params.extract.store_dtype]
    knobs = params.model_dump(include={"extract", "languages", "model"}) | {"max_tokens": params.corpus.max_tokens}
    knobs |= {"hookpoints": hookpoints, "texts": texts["text_id"].to_list()}
    keep = scratch(fingerprint("identify", knobs, {str(path): dvc_md5(path) for path in (FEATURES, SAES, COUNTS)}))
    ordered = tokens.by_length([text for text in tokenized if text.own])
    with Progress("identify", sum(text.own for text in ordered), "tokens") as progress:
        for number, batch in enumerate(tokens.batches(ordered, params.extract.batch_tokens)):
            text = torch.tensor([int(one.text_id) for one in batch])
            file = keep / f"batch-{number:06d}.safetensors"
            if (part := read_part(file)) is not None:
                for method, rows in part.items():
                    there.totals[method][text] = rows
                progress.skip(sum(one.own for one in batch))
                continue
            owner = text.repeat_interleave(torch.tensor([one.own for one in batch]))
            names = {there.encodes(name): name for name in hookpoints}
            padded, mask, own = (part.to(there.device) for part in forward.collate(batch))
            with torch.inference_mode():
                # Rounded as `extract` stores them, since the SAEs and the counts know no others; but not to int8, whose
                # steps depend on the whole shard: there 0.4 % of the firings are others (measured on planted features).
                seen = forward.own_activations(model, list(names), (padded, mask, own), store_dtype)
                for name, activations in seen.items():
                    there.add(names[name], activations, owner)
            found = {method: table[text] for method, table in there.totals.items()}
            write_atomically(file, functools.partial(save_file, found))
            progress.update(sum(one.own for one in batch))
    shutil.rmtree(keep, ignore_errors=True)


def write(
    name: str, texts: pl.DataFrame, totals: dict[str, Any], features: pl.DataFrame, lid: Any, params: config.Config
) -> dict[str, float]:
    """Predict, write predictions and confusion matrices, and return the numbers (their keys begin with `name`).

    Texts in languages that fastText does not know, or does not tell apart, are left out for all methods; what the units
    make of all texts, among all languages, is in the numbers `all_languages/...`.
    """
    from babelscope.identification import metrics

    among, refused = lid.match(params.languages)
    # Both are asked about the same texts and for the same languages; a single one is no question.
    baseline = len(among) > 1 or not refused
    compared = list(among.values()) if baseline else params.languages
    for language, reason in refused.items():
        log.warning("%s: %s: %s", language, "left out for both" if baseline else "not compared with fastText", reason)
    known = texts.filter(pl.col("language").is_in(compared))
    parts = by_units(texts, totals, features, compared, params.languages)
    if baseline and len(known):
        labels = {"method": pl.lit(BASELINE), "normalize": pl.lit("none")}
        found = lid.predict(known["text"].to_list(), among)
        parts.append(known.select("text_id", "language").with_columns(**labels).hstack(found))
    if not parts:
        raise UserError(f"{FEATURES}: no features, and fastText knows less than two of params.yaml's languages")
    predictions = pl.concat(parts)
    write_atomically(OUT / f"{name or 'predictions'}.parquet", predictions.write_parquet)
    matrices = [
        metrics.confusion(rows["language"], rows["predicted"], compared).select(
            pl.lit(method).alias("method"), pl.lit(normalize).alias("normalize"), "language", "predicted", "texts"
        )
        for (method, normalize), rows in predictions.group_by("method", "normalize", maintain_order=True)
    ]
    write_atomically(OUT / f"{name}_confusion.parquet".lstrip("_"), pl.concat(matrices).write_parquet)
    numbers = metrics.figures(predictions, compared, BASELINE) | {"texts": len(known), "languages": len(compared)}
    report(name or "held out", numbers)
    if len(compared) < len(params.languages) and (
        parts := by_units(texts, totals, features, params.languages, params.languages)
    ):
        alone = metrics.figures(pl.concat(parts), params.languages, BASELINE) | {"texts": len(texts)}
        report(f"{name or 'held out'}, all languages", alone)
        numbers |= {f"all_languages/{key}": value for key, value in alone.items()}
    return {f"{name}/{key}".lstrip("/"): value for key, value in numbers.items()}


def by_units(
    texts: pl.DataFrame, totals: dict[str, Any], features: pl.DataFrame, among: list[str], languages: list[str]
) -> list[pl.DataFrame]:
    """What every method predicts for those of `texts` that are in `among`, and of these languages only.

    `totals`: for each method `[texts, languages]`, float64.
    """
    from babelscope.evaluation import identify
    from babelscope.identification.unit_totals import METHODS

    mask = texts["language"].is_in(among)
    base = texts.filter(mask).select("text_id", "language")
    parts = []
    for kind, methods in METHODS.items():
        mine = features.filter(kind=kind)
        units = {language: mine.filter(pl.col("language") == language).height for language in among}
        for method in (method for method in methods if method in totals and any(units.values())):
            table = pl.DataFrame(totals[method].numpy(), schema=languages).filter(mask).select(among)
            for normalize in ("units", "none"):
                found = identify(table.with_row_index("text"), units, normalize=normalize)
                labels = {"method": pl.lit(method), "normalize": pl.lit(normalize)}
                parts.append(base.with_columns(**labels).hstack(found.select("predicted", "score")))
    return parts if len(base) else []


def report(texts: str, numbers: dict[str, float]) -> None:
    rows = []
    for key, value in numbers.items():
        kind, _, method = key.partition("/")
        if kind == "accuracy":
            p = numbers.get(f"mcnemar_p/{method}")
            shown = (
                f"{100 * value:.2f} %",
                f"{100 * numbers[f'macro_f1/{method}']:.2f} %",
                "-" if p is None else f"{p:.2g}",
            )
            rows.append([texts, method, *shown])
    stage.table(["texts", "method", "accuracy", "macro F1", "McNemar p"], rows, labels=2)


if __name__ == "__main__":
    stage.run(main)
