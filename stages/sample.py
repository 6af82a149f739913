"""Stage `sample`: the texts of every language, split for training and evaluation.

Writes data/corpus/texts.parquet, data/corpus/sources.json (whence, under which licence) and metrics/sample.json.
"""

import logging
from pathlib import Path
from typing import Any

import polars as pl

from babelscope import config
from babelscope.config import schema
from babelscope.core import stage
from babelscope.core.errors import UserError
from babelscope.core.files import write_atomically, write_json
from babelscope.core.progress import Progress
from babelscope.corpus import gettext_catalogs, hub, sampling, text_files
from babelscope.models.loading import load_tokenizer
from babelscope.models.tokens import content_ids

log = logging.getLogger(__name__)

TEXTS = Path("data/corpus/texts.parquet")
SOURCES = Path("data/corpus/sources.json")
METRICS = Path("metrics/sample.json")


def main() -> None:
    params = config.load()
    config.check_folders(params)
    section = params.corpus
    warn_of_unidentifiable(params.languages)
    texts, sources = read(section, params.languages)
    foreign = contaminated(texts, params.languages, section.lid) if section.lid is not None else None
    if foreign is not None:
        texts = texts.filter(~foreign)
    tokenizer = load_tokenizer(params.model)

    def tokenize(batch: list[str]) -> list[list[int]]:
        return content_ids(tokenizer, batch)

    with Progress("sample", len(params.languages), "languages") as progress:
        chosen, totals = sampling.sample(
            texts, params.languages, section, params.seed, tokenize, advance=progress.update
        )
    write_atomically(TEXTS, chosen.write_parquet)
    write_json(SOURCES, {"sources": sources})
    numbers = metrics(totals, {"train": section.train_tokens, "eval": section.eval_tokens})
    if foreign is not None:
        numbers["dropped_by_lid"] = int(foreign.sum())
    write_json(METRICS, numbers)
    report(totals)


def read(section: schema.Corpus, languages: list[str]) -> tuple[pl.DataFrame, list[dict[str, str | None]]]:
    """All texts of the languages, and a record of each place that they come from."""
    if section.source == "huggingface":
        with Progress("read", len(section.datasets) * len(languages) * hub.ROWS, "rows") as progress:
            return hub.read(section.datasets, languages, advance=progress.update)
    reader = gettext_catalogs.read if section.source == "gettext" else text_files.read
    texts = reader(section, languages)
    return texts, [{"path": name, "revision": None, "license": None} for name in sorted(set(texts["source"]))]


def warn_of_unidentifiable(languages: list[str]) -> None:
    """Say before any long work which languages `identify` leaves out, and `steer` does not steer."""
    from babelscope.corpus.lid import FastText

    for language, reason in FastText().match(languages)[1].items():
        log.warning("%s: left out where fastText is compared with (identify), and not steered: %s", language, reason)


def contaminated(texts: pl.DataFrame, languages: list[str], threshold: float) -> pl.Series:
    """Which texts fastText takes for another language than theirs, with a probability of at least `threshold`."""
    from babelscope.corpus.lid import FastText

    lid = FastText()
    known, refused = lid.match(languages)
    if not known:
        raise UserError("params.yaml: corpus.lid: fastText knows none of the languages; allowed: null")
    for language, reason in refused.items():
        log.warning("%s: its texts are not checked: %s", language, reason)
    found = lid.predict(texts["text"].to_list())
    label = texts["language"].replace_strict({name: code for code, name in known.items()}, default=None)
    foreign = (found["predicted"] != label) & (found["score"] >= threshold)
    dropped = texts.filter(foreign.fill_null(False)).group_by("language").len().sort("language")
    for language, count in dropped.iter_rows():
        log.info("%s: %d texts that fastText takes for another language are dropped", language, count)
    return foreign.fill_null(False)


def metrics(totals: pl.DataFrame, budgets: dict[str, int]) -> dict[str, Any]:
    """What metrics/sample.json holds: tokens and texts, in all, per language and split, and of each source."""
    together = per_split(totals)
    short = together.filter(pl.col("tokens") < pl.col("split").replace_strict(budgets))
    content = {
        "languages": totals["language"].n_unique(),
        "texts": int(totals["texts"].sum()),
        "tokens": int(totals["tokens"].sum()),
        "short_of_budget": short["language"].n_unique(),
    }
    for language, split, texts, tokens in together.iter_rows():
        content |= {f"{split}_tokens/{language}": tokens, f"{split}_texts/{language}": texts}
    for language, split, source, texts, tokens in totals.iter_rows():
        content |= {f"{split}_tokens/{language}/{source}": tokens, f"{split}_texts/{language}/{source}": texts}
    return content


def per_split(totals: pl.DataFrame) -> pl.DataFrame:
    """language, split, texts, tokens: of all sources together."""
    return totals.group_by("language", "split", maintain_order=True).agg(pl.col("texts", "tokens").sum())


def report(totals: pl.DataFrame) -> None:
    rows = []
    for (language,), mine in per_split(totals).group_by("language", maintain_order=True):
        have = {split: (f"{tokens:,}", f"{texts:,}") for _, split, texts, tokens in mine.iter_rows()}
        rows.append([language, *have["train"], *have["eval"]])
    stage.table(["language", "train tokens", "texts", "eval tokens", "texts"], rows)


if __name__ == "__main__":
    stage.run(main)
