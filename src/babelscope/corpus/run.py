"""Stage `sample`: the texts of every language, split for training and evaluation."""

import logging
from functools import partial
from typing import Any

import polars as pl

from babelscope.config import Config, check_folders, schema
from babelscope.config.values import expanded
from babelscope.core import stage
from babelscope.core.errors import UserError
from babelscope.core.files import write_atomically, write_json
from babelscope.core.fingerprint import texts_md5
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
    section, lid = params.corpus, FastText()
    trained = section.train_languages or params.languages
    added = [name for name in params.languages if name not in trained]
    for language, reason in lid.match(params.languages)[1].items():
        log.warning("%s: excluded from steering and from the comparison with fastText (identify): %s", language, reason)
    texts, sources, foreign = read(section, trained, lid)
    tokenizer = loading.load_tokenizer(params.model)
    tokenize = partial(content_ids, tokenizer)
    with Progress("sample", len(trained) + len(added), "languages") as progress:
        chosen, totals = sampling.sample(texts, trained, section, params.seed, tokenize, progress.update)
        # A further language changes no text of those that train SAEs: these texts are drawn as if it were not there.
        write_atomically(paths.train_texts, chosen.sort("language", maintain_order=True).write_parquet)
        if added:
            texts, sources, foreign = read(section, [*trained, *added], lid)
            more = sampling.sample(texts, added, section, params.seed, tokenize, progress.update, taken=chosen)
            chosen, totals = pl.concat([chosen, more[0]]), pl.concat([totals, more[1]])
    chosen, totals = (ordered(table, params.languages) for table in (chosen, totals))
    write_atomically(paths.texts, chosen.write_parquet)
    write_json(paths.sources, {"sources": sources})
    numbers = metrics(totals, {"train": section.train_tokens, "eval": section.eval_tokens})
    if section.lid is not None:
        numbers["dropped_by_lid"] = foreign
    write_json(paths.metrics("sample"), numbers)
    report(totals)


def ordered(table: pl.DataFrame, languages: list[str]) -> pl.DataFrame:
    """The rows of `languages`, in their order."""
    kept = table.filter(pl.col("language").is_in(languages))
    return kept.sort(pl.col("language").cast(pl.Enum(languages)), maintain_order=True)


def read(
    section: schema.Corpus, languages: list[str], lid: FastText
) -> tuple[pl.DataFrame, list[dict[str, str | None]], int]:
    """The texts of the languages, a record per source, and the number of texts that `corpus.lid` dropped."""
    texts, sources = read_all(section, languages)
    if section.lid is None:
        return texts, sources, 0
    foreign = contaminated(texts, languages, section.lid, lid)
    return texts.filter(~foreign), sources, int(foreign.sum())


def read_all(section: schema.Corpus, languages: list[str]) -> tuple[pl.DataFrame, list[dict[str, str | None]]]:
    """All texts of the languages, and a record per source."""
    if section.source == "huggingface":
        with Progress("read", len(section.datasets) * len(languages) * hub.ROWS, "rows") as progress:
            return hub.read(section.datasets, languages, advance=progress.update)
    gettext = section.source == "gettext"
    texts = gettext_catalogs.read(section, languages) if gettext else text_files.read(str(section.path), languages)
    # DVC does not watch a folder that params.yaml names; `track` warns if its MD5 is another one.
    revision = None if section.path is None else texts_md5(expanded(section.path))
    return texts, [{"path": name, "revision": revision, "license": None} for name in sorted(set(texts["source"]))]


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
