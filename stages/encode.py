"""Stage `encode <hookpoint>`: how often every latent fires on every language of the training split."""

import sys
from pathlib import Path
from typing import NamedTuple

import polars as pl

from babelscope import config, sae
from babelscope.activations.store import ActivationStore, place
from babelscope.core import stage
from babelscope.core.files import copy_file, read_table, write_atomically, write_json
from babelscope.core.paths import Paths
from babelscope.core.progress import Progress
from babelscope.features.counter import Counter, whole_texts
from babelscope.models import hardware
from babelscope.models.hookpoints import layer_of


def main() -> None:
    params = config.load()
    hookpoint = config.hookpoint_argument(sys.argv, params)
    paths = Paths()
    counts, totals = paths.counts(hookpoint), paths.totals(hookpoint)
    if params.train.source == "stream":
        copy_file(paths.stream / hookpoint / "counts.parquet", counts)
        copy_file(paths.stream / hookpoint / "totals.parquet", totals)
    else:
        found = encode(hookpoint, params)
        write_atomically(counts, found.counts.write_parquet)
        write_atomically(totals, found.totals.write_parquet)
    firings, tokens = read_table(counts), int(read_table(totals)["tokens"].sum())
    fired, l0 = firings["unit"].n_unique(), int(firings["tokens"].sum()) / tokens
    numbers = {"tokens": tokens, "l0": l0, "latents_fired": fired, "layer": layer_of(hookpoint)}
    write_json(Path(f"metrics/encode.{hookpoint}.json"), numbers)
    stage.table(["hookpoint", "tokens", "latents that fired", "L0"], [[hookpoint, f"{tokens:,}", fired, f"{l0:.1f}"]])


class Tables(NamedTuple):
    """Counts per language and latent, and totals per language."""

    counts: pl.DataFrame
    totals: pl.DataFrame


def encode(hookpoint: str, params: config.Config) -> Tables:
    """Encode the stored activations of the training split."""
    device = hardware.prepare(params.hardware)
    paths = Paths()
    dictionary = sae.load(paths.saes, hookpoint).to(device)
    activations = ActivationStore(place(paths.activations, dictionary.input_name(hookpoint)))
    table = read_table(paths.tokens).filter(pl.col("split") == "train")
    language = table["language"].cast(pl.Enum(params.languages)).to_physical().cast(pl.Int64).to_torch()
    text = table["text_id"].rle_id().cast(pl.Int64).to_torch()
    rows = table["row"].to_torch()

    counter = Counter(params.languages, dictionary.latents)
    with Progress(f"encode {hookpoint}", len(rows), "tokens") as progress:
        for start, end in whole_texts(text, params.encode.chunk_tokens):
            values, indices = dictionary.encode(activations.gather(rows[start:end]).to(device))
            counter.add(values.cpu(), indices.cpu(), language[start:end], text[start:end])
            progress.update(end - start)
    totals = (
        table.group_by("language")
        .agg(tokens=pl.len().cast(pl.Int64), texts=pl.col("text_id").n_unique().cast(pl.Int64))
        .sort(pl.col("language").cast(pl.Enum(params.languages)))
    )
    return Tables(counter.frame(layer_of(hookpoint)), totals)


if __name__ == "__main__":
    stage.run(main)
