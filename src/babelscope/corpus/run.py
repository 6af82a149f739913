"""Stage `sample`: the texts of every language, split for training and evaluation."""

import logging
from typing import Any

import polars as pl

from babelscope.config import Config, check_folders, schema
from babelscope.core import stage
from babelscope.core.errors import UserError
from babelscope.core.files import write_atomically, write_json
from babelscope.core.paths import Paths
from babelscope.core.progress import Progress
from babelscope.corpus import gettext_catalogs, hub, sampling, text_files
from babelscope.corpus.lid import FastText
from babelscope.models import loading
from babelscope.models.tokens import content_ids

log = logging.getLogger(__name__)


def run(params: Config, paths: Paths) -> None:
    """Write `paths.texts`, `paths.sources` (origin, revision and licence of the texts) and the stage's metrics."""
    check_folders(params)
    section = params.corpus
    lid = FastText()
    for language, reason in lid.match(params.languages)[1].items():
        log.warning("%s: excluded from steering and from the comparison with fastText (identify): %s", language, reason)
    texts, sources = read(section, params.languages)
    foreign = None if section.lid is None else contaminated(texts, params.languages, section.lid, lid)
    if foreign is not None:
        texts = texts.filter(~foreign)
    tokenizer = loading.load_tokenizer(params.model)
    with Progress("sample", len(params.languages), "languages") as progress:
        chosen, totals = sampling.sample(
            texts, params.languages, section, params.seed, lambda batch: content_ids(tokenizer, batch),
            advance=progress.update,
        )  # fmt: skip
    write_atomically(paths.texts, chosen.write_parquet)
    write_json(paths.sources, {"sources": sources})
    numbers = metrics(totals, {"train": section.train_tokens, "eval": section.eval_tokens})
    if foreign is not None:
        numbers["dropped_by_lid"] = int(foreign.sum())
    write_json(paths.metrics("sample"), numbers)
    report(totals)


def read(section: schema.Corpus, languages: list[str]) -> tuple[pl.DataFrame, list[dict[str, str | None]]]:
    """All texts of the languages, and a record per source."""
    if section.source == "huggingface":
        with Progress("read", len(section.datasets) * len(languages) * hub.ROWS, "rows") as progress:
            return hub.read(section.datasets, languages, advance=progress.update)
    gettext = section.source == "gettext"
    texts = gettext_catalogs.read(section, languages) if gettext else text_files.read(str(section.path), languages)
    return texts, [{"path": name, "revision": None, "license": None} for name in sorted(set(texts["source"]))]


def contaminated(texts: pl.DataFrame, languages: list[str], threshold: float, lid: FastText) -> pl.Series:
    """Whether fastText assigns each text to another language with a probability of at least `threshold`: bool."""
    known, refused = lid.match(languages)
    if not known:
        raise UserError("params.yaml: corpus.lid: fastText knows none of the languages; set it to null")
    for language, reason in refused.items():
        log.warning("%s: corpus.lid does not check its texts: %s", language, reason)
    found = lid.predict(texts["text"].to_list())
    label = texts["language"].replace_strict({name: code for code, name in known.items()}, default=None)
    foreign = ((found["predicted"] != label) & (found["score"] >= threshold)).fill_null(False)
    for language, count in texts.filter(foreign).group_by("language").len().sort("language").iter_rows():
        log.info("%s: dropped %d texts that fastText assigns to another language", language, count)
    return foreign


def metrics(totals: pl.DataFrame, budgets: dict[str, int]) -> dict[str, Any]:
    """The content of metrics/sample.json: tokens and texts in all, per language and split, and per source."""
    by_split = per_split(totals)
    short = by_split.filter(pl.col("tokens") < pl.col("split").replace_strict(budgets))
    content = {
        "languages": totals["language"].n_unique(),
        "texts": int(totals["texts"].sum()),
        "tokens": int(totals["tokens"].sum()),
        "short_of_budget": short["language"].n_unique(),
    }
    for language, split, texts, tokens in by_split.iter_rows():
        content |= {f"{split}_tokens/{language}": tokens, f"{split}_texts/{language}": texts}
    for language, split, source, texts, tokens in totals.iter_rows():
        content |= {f"{split}_tokens/{language}/{source}": tokens, f"{split}_texts/{language}/{source}": texts}
    return content


def per_split(totals: pl.DataFrame) -> pl.DataFrame:
    """`language`, `split`, `texts` and `tokens`, summed over the sources."""
    return totals.group_by("language", "split", maintain_order=True).agg(pl.col("texts", "tokens").sum())


def report(totals: pl.DataFrame) -> None:
    """Log a line per language."""
    rows = []
    for (language,), part in per_split(totals).group_by("language", maintain_order=True):
        shown = {split: (f"{tokens:,}", f"{texts:,}") for _, split, texts, tokens in part.iter_rows()}
        rows.append([language, *shown["train"], *shown["eval"]])
    stage.table(["language", "train tokens", "texts", "eval tokens", "texts"], rows)
