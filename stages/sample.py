"""Stage `sample`: the texts of every language, split for training and evaluation.

Writes data/corpus/texts.parquet and metrics/sample.json.
"""

from pathlib import Path
from typing import Any

import polars as pl

from babelscope import config, stage
from babelscope.corpus import gettext_catalogs, sampling, text_files
from babelscope.files import write_atomically, write_json
from babelscope.models.loading import load_tokenizer
from babelscope.progress import Progress

TEXTS = Path("data/corpus/texts.parquet")
METRICS = Path("metrics/sample.json")


def main() -> None:
    params = config.load()
    section = params.corpus
    read = gettext_catalogs.read if section.source == "gettext" else text_files.read
    texts = read(section, params.languages)
    tokenizer = load_tokenizer(params.model)

    def count_tokens(batch: list[str]) -> list[int]:
        return [len(ids) for ids in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]]

    with Progress("sample", len(params.languages), "languages") as progress:
        chosen, totals = sampling.sample(
            texts, params.languages, section, params.seed, count_tokens, advance=progress.update
        )
    write_atomically(TEXTS, chosen.write_parquet)
    write_json(METRICS, metrics(totals, {"train": section.train_tokens, "eval": section.eval_tokens}))
    report(totals)


def metrics(totals: pl.DataFrame, budgets: dict[str, int]) -> dict[str, Any]:
    """What metrics/sample.json holds: tokens and texts, in all and per language and split."""
    short = totals.filter(pl.col("tokens") < pl.col("split").replace_strict(budgets))
    content = {
        "languages": totals["language"].n_unique(),
        "texts": int(totals["texts"].sum()),
        "tokens": int(totals["tokens"].sum()),
        "short_of_budget": short["language"].n_unique(),
    }
    for language, split, texts, tokens in totals.iter_rows():
        content[f"{split}_tokens/{language}"] = tokens
        content[f"{split}_texts/{language}"] = texts
    return content


def report(totals: pl.DataFrame) -> None:
    rows = []
    for (language,), mine in totals.group_by("language", maintain_order=True):
        have = {split: (f"{tokens:,}", f"{texts:,}") for _, split, texts, tokens in mine.iter_rows()}
        rows.append([language, *have["train"], *have["eval"]])
    stage.table(["language", "train tokens", "texts", "eval tokens", "texts"], rows)


if __name__ == "__main__":
    stage.run(main)
