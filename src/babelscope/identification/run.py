"""Stage `identify`: predict the language of texts from the units that fire, and compare with fastText.

It uses the held-out split, and texts of another domain if `identify.also` names them.
"""

import logging
from collections.abc import Mapping

import polars as pl
from torch import Tensor

from babelscope import sae
from babelscope.activations.rows import read_rows
from babelscope.activations.store import opened
from babelscope.config import Config
from babelscope.core import resume, stage
from babelscope.core.errors import UserError
from babelscope.core.files import read_table, write_atomically, write_json
from babelscope.core.paths import Paths
from babelscope.core.progress import Progress
from babelscope.corpus import further
from babelscope.corpus.lid import FastText
from babelscope.identification import metrics
from babelscope.identification.classify import identify
from babelscope.identification.unit_totals import METHODS, Owned, UnitTotals, owned
from babelscope.models import forward, hardware, loading, tokens

BASELINE = "fasttext"
# Tokens encoded at once, which bounds the memory.
CHUNK = 8192
log = logging.getLogger(__name__)


def run(params: Config, paths: Paths) -> None:
    """Write the tables below `paths.identification` and the stage's metrics."""
    device, also, lid = hardware.prepare(params.hardware), read_also(params), FastText()
    features = read_table(paths.features)
    owners = read_owners(features, params, paths)
    latents = features.filter(kind="sae")["hookpoint"].unique(maintain_order=True).to_list()
    saes = sae.SAECache(paths.saes, latents, device)
    if not owners:
        log.warning("%s: no features, so only fastText identifies anything", paths.features)

    corpus = read_table(paths.texts).filter(split="eval")
    held_out = UnitTotals(len(corpus), owners, saes, device)
    # No stage stores the activations of neurons, nor any activations if `train.source` is `stream`.
    stored = [name for name in saes if params.train.source != "stream"]
    add_texts(held_out, corpus, [name for name in owners if name not in stored], params, paths)
    add_stored(held_out, corpus, stored, paths)
    numbers = write("", corpus, held_out.totals, features, lid, params, paths)
    for name in ("also", "also_confusion"):
        (paths.identification / f"{name}.parquet").unlink(missing_ok=True)
    if also is not None:
        others = UnitTotals(len(also), owners, saes, device)
        add_texts(others, also, list(owners), params, paths)
        numbers |= write("also", also, others.totals, features, lid, params, paths)
    write_json(paths.metrics("identify"), numbers)


def read_also(params: Config) -> pl.DataFrame | None:
    """The texts of `identify.also`: the first `also_texts` of each language by text_id, a hash of the text."""
    also = params.identify.also
    if also is None:
        return None
    texts = further.read(also, params.languages, "identify.also")
    chosen = texts.filter(pl.int_range(pl.len()).over("language") < params.identify.also_texts)
    return chosen.sort(pl.col("language").cast(pl.Enum(params.languages)), maintain_order=True)


def read_owners(features: pl.DataFrame, params: Config, paths: Paths) -> dict[str, Owned]:
    """The selected units of every hookpoint and the languages that own them."""
    owners = {}
    for (kind, hookpoint), rows in features.group_by("kind", "hookpoint", maintain_order=True):
        columns = ["unit", "language", "min_positive", "max"]
        counts = read_table(paths.counts(str(hookpoint)), columns=columns) if kind == "sae" else None
        owners[str(hookpoint)] = owned(rows, counts, params.languages)
    return owners


def add_stored(held_out: UnitTotals, corpus: pl.DataFrame, hookpoints: list[str], paths: Paths) -> None:
    """Add the stored activations of the held-out split at `hookpoints`."""
    if not hookpoints:
        return
    numbers = corpus.select("text_id", text=pl.int_range(pl.len(), dtype=pl.Int64))
    table = read_rows(paths, corpus["language"].unique().to_list()).filter(split="eval")
    table = table.join(numbers, on="text_id", how="left", maintain_order="left")
    if table["text"].null_count():
        raise UserError(f"{paths.tokens}: holds texts that {paths.texts} lacks; run `dvc repro extract extend`")
    row, text = table["row"].to_torch(), table["text"].to_torch()
    with Progress("identify", len(row) * len(hookpoints), "tokens") as progress:
        for hookpoint in hookpoints:
            store = opened(paths, held_out.reads(hookpoint))
            for first in range(0, len(row), CHUNK):
                part = slice(first, first + CHUNK)
                held_out.add(hookpoint, store.gather(row[part]), text[part])
                progress.update(len(row[part]))


def add_texts(found: UnitTotals, corpus: pl.DataFrame, hookpoints: list[str], params: Config, paths: Paths) -> None:
    """Add the activations at `hookpoints` from forward passes over `corpus`."""
    if not hookpoints:
        return
    by_input = {found.reads(name): name for name in hookpoints}
    # The ids decide the order of the batches.
    numbered = corpus.select(pl.col("text_id").alias("id"), "text", text_id=pl.int_range(pl.len()).cast(pl.String))
    texts = tokens.tokenize_corpus(loading.load_tokenizer(params.model), numbered, params.corpus.max_tokens)
    number = texts.frame["text_id"].cast(pl.Int64).to_torch()
    model = loading.load_model(params.model, params.extract.dtype).to(found.device)
    tokens.check_fits(model, texts)
    # Rounded as for the SAEs and the counts. int8 cannot be reproduced, since its steps depend on the whole shard:
    # with `store_dtype: int8`, 0.4 % of the firings differ (measured on planted features).
    dtype = loading.DTYPES[params.extract.store_dtype]

    def compute(batch: list[int]) -> dict[str, Tensor]:
        for activations, text in forward.read_batches(model, texts, [batch], list(by_input), dtype):
            for name, x in activations.items():
                found.add(by_input[name], x, number[text])
        return {method: table[number[batch]] for method, table in found.totals.items()}

    depends = params.model_dump(include={"extract", "languages", "model"})
    depends |= {"max_tokens": params.corpus.max_tokens, "hookpoints": hookpoints, "texts": corpus["text_id"].to_list()}
    batches = texts.batches(params.extract.batch_tokens)
    with resume.kept("identify", depends, [paths.features, paths.saes, paths.all_counts]) as folder:
        parts = resume.parts(
            "identify", batches, compute, folder, size=lambda batch: int(texts.lengths[batch].sum()), unit="tokens"
        )
        for batch, part in zip(batches, parts, strict=True):
            for method, rows in part.items():
                found.totals[method][number[batch]] = rows


def write(
    name: str, texts: pl.DataFrame, totals: Mapping[str, Tensor], features: pl.DataFrame, lid: FastText,
    params: Config, paths: Paths,
) -> dict[str, float]:  # fmt: skip
    """Write predictions and confusion matrices, and return the numbers, whose keys begin with `name`.

    Languages that fastText does not know or does not distinguish are left out for all methods. The numbers
    `all_languages/...` are those of the units on all texts and languages.
    """
    among, refused = lid.match(params.languages)
    # Units and fastText get the same texts and languages. fastText is left out if it knows only one of several.
    baseline = len(among) > 1 or not refused
    compared = list(among.values()) if baseline else params.languages
    for language, reason in refused.items():
        log.warning("%s: %s: %s", language, "left out for both" if baseline else "not compared with fastText", reason)
    known = texts.filter(pl.col("language").is_in(compared))
    parts = by_units(texts, totals, features, compared, params.languages)
    if baseline and len(known):
        parts.append(labelled(known, BASELINE, "none", lid.predict(known["text"].to_list(), among)))
    if not parts:
        raise UserError(f"{paths.features}: no features, and fastText knows fewer than two of params.yaml's languages")
    predictions = pl.concat(parts)
    write_atomically(paths.identification / f"{name or 'predictions'}.parquet", predictions.write_parquet)
    confusion = pl.concat(
        metrics.confusion(rows["language"], rows["predicted"], compared).select(
            pl.lit(method).alias("method"), pl.lit(normalize).alias("normalize"), pl.all()
        )
        for (method, normalize), rows in predictions.group_by("method", "normalize", maintain_order=True)
    )
    write_atomically(paths.identification / f"{name}_confusion.parquet".lstrip("_"), confusion.write_parquet)
    numbers = metrics.figures(predictions, compared, BASELINE) | {"texts": len(known), "languages": len(compared)}
    report(name or "held out", numbers)
    numbers |= metrics.by_source(predictions, known.select("text_id", "source"))
    everything = by_units(texts, totals, features, params.languages, params.languages)
    if len(compared) < len(params.languages) and everything:
        alone = metrics.figures(pl.concat(everything), params.languages, BASELINE) | {"texts": len(texts)}
        report(f"{name or 'held out'}, all languages", alone)
        numbers |= {f"all_languages/{key}": value for key, value in alone.items()}
    return {f"{name}/{key}".lstrip("/"): value for key, value in numbers.items()}


def by_units(
    texts: pl.DataFrame, totals: Mapping[str, Tensor], features: pl.DataFrame, among: list[str], languages: list[str]
) -> list[pl.DataFrame]:
    """The predictions of every method for `texts` in the languages `among`, which are the only candidates.

    `totals`: for each method `[texts, languages]`, float64.
    """
    mask = texts["language"].is_in(among)
    parts = []
    for kind, methods in METHODS.items():
        of_kind = features.filter(kind=kind)
        units = {language: of_kind.filter(language=language).height for language in among}
        for method in (method for method in methods if method in totals and any(units.values())):
            table = pl.DataFrame(totals[method].numpy(), schema=languages).filter(mask).select(among)
            for normalize in ("units", "none"):
                found = identify(table.with_row_index("text"), units, normalize=normalize)
                parts.append(labelled(texts.filter(mask), method, normalize, found.select("predicted", "score")))
    return parts if mask.any() else []


def labelled(texts: pl.DataFrame, method: str, normalize: str, found: pl.DataFrame) -> pl.DataFrame:
    """`found` (`predicted`, `score`), a method's results for `texts`, as rows of the table of predictions."""
    labels = {"method": pl.lit(method), "normalize": pl.lit(normalize)}
    return texts.select("text_id", "language").with_columns(**labels).hstack(found)


def report(texts: str, numbers: Mapping[str, float]) -> None:
    """Log a line per method."""
    rows = []
    for method in (key.removeprefix("accuracy/") for key in numbers if key.startswith("accuracy/")):
        p = numbers.get(f"mcnemar_p/{method}")
        shares = [f"{100 * numbers[f'{kind}/{method}']:.2f} %" for kind in ("accuracy", "macro_f1")]
        rows.append([texts, method, *shares, "-" if p is None else f"{p:.2g}"])
    stage.table(["texts", "method", "accuracy", "macro F1", "McNemar p"], rows, labels=2)
