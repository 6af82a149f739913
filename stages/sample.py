"""Stage `sample`: the texts of every language, split for training and evaluation.

Writes data/corpus/texts.parquet and metrics/sample.json.
"""

import logging
from pathlib import Path
from typing import Any

import polars as pl

from babelscope import config, stage
from babelscope.corpus import gettext_catalogs, sampling, text_files
from babelscope.files import write_atomically, write_json
from babelscope.models.loading import load_tokenizer

log = logging.getLogger("sample")

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

    chosen, totals = sampling.sample(texts, params.languages, section, params.seed, count_tokens)
    write_atomically(TEXTS, chosen.write_parquet)
    write_json(METRICS, metrics(totals, {"train": section.train_tokens, "eval": section.eval_tokens}))
    for line in table(totals):
        log.info("%s", line)


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


def table(totals: pl.DataFrame) -> list[str]:
    """The lines of the closing table."""
    lines = [f"{'language':<12}{'train tokens':>14}{'texts':>8}{'eval tokens':>14}{'texts':>8}"]
    for (language,), rows in totals.group_by("language", maintain_order=True):
        have = {split: (tokens, texts) for _, split, texts, tokens in rows.iter_rows()}
        numbers = f"{have['train'][0]:>14,}{have['train'][1]:>8,}{have['eval'][0]:>14,}{have['eval'][1]:>8,}"
        lines.append(f"{language!s:<12}{numbers}")
    return lines


if __name__ == "__main__":
    stage.run(main)
