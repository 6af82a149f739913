"""Stage `encode <hookpoint>`: how often every latent fires on every language that trains SAEs (training split)."""

import math
from collections.abc import Sequence

import polars as pl

from babelscope import sae
from babelscope.activations.store import ActivationStore
from babelscope.config import Config
from babelscope.core import stage
from babelscope.core.files import copy_file, read_table, write_atomically, write_json
from babelscope.core.paths import Paths
from babelscope.core.progress import Progress
from babelscope.features.counter import Counter, totals, whole_texts
from babelscope.models import hardware
from babelscope.models.names import layer_of
from babelscope.models.tokens import codes
from babelscope.sae import SAE
from babelscope.sae.metrics import quality


def run(params: Config, paths: Paths, hookpoint: str) -> None:
    """Write `paths.encoded(hookpoint)` and the stage's metrics."""
    targets = paths.encoded(hookpoint)
    if params.train.source == "stream":
        for name, target in zip(("counts", "totals"), targets, strict=True):
            copy_file(paths.stream / hookpoint / f"{name}.parquet", target)
        counts, by_language = map(read_table, targets)
    else:
        table, dictionary = read_table(paths.tokens), sae.load(paths.saes, hookpoint)
        activations = ActivationStore(paths.activations / dictionary.input_name(hookpoint))
        languages = table["language"].unique().sort().to_list()
        counts, by_language = encode(hookpoint, dictionary, activations, table.filter(split="train"), languages, params)
        for found, target in zip((counts, by_language), targets, strict=True):
            write_atomically(target, found.write_parquet)
    tokens, fired = int(by_language["tokens"].sum()), counts["unit"].n_unique()
    l0 = int(counts["tokens"].sum()) / tokens
    numbers = {"tokens": tokens, "l0": l0, "latents_fired": fired, "layer": layer_of(hookpoint)}
    write_json(paths.metrics("encode", hookpoint), numbers)
    stage.table(["hookpoint", "tokens", "latents that fired", "L0"], [[hookpoint, f"{tokens:,}", fired, f"{l0:.1f}"]])


def count_added(
    hookpoint: str, languages: list[str], params: Config, paths: Paths
) -> tuple[tuple[pl.DataFrame, pl.DataFrame], dict[str, float]]:
    """Counts and totals of languages that train no SAE, and `added_fvu/<hookpoint>/<language>` on held-out texts."""
    table, dictionary = read_table(paths.extended_tokens), sae.load(paths.saes, hookpoint)
    encoded, decoded = (
        ActivationStore(paths.extended / name) for name in (dictionary.input_name(hookpoint), hookpoint)
    )
    counted = encode(hookpoint, dictionary, encoded, table.filter(split="train"), languages, params)
    held_out = table.filter(split="eval")
    code, rows = codes(held_out["language"], languages), held_out["row"].to_torch()
    inputs = encoded if dictionary.is_transcoder else None
    fvu = quality(dictionary, decoded, rows, code, len(languages), inputs).fvu_of
    figures = {f"added_fvu/{hookpoint}/{name}": value for name, value in zip(languages, fvu, strict=True)}
    return counted, {key: value for key, value in figures.items() if math.isfinite(value)}


def encode(
    hookpoint: str,
    dictionary: SAE,
    activations: ActivationStore,
    table: pl.DataFrame,
    languages: Sequence[str],
    params: Config,
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Encode stored activations: counts per language and latent, and totals.

    Parameters
    ----------
    activations: what the SAE encodes.
    table: the rows to count, with `row`, `text_id` and `language`; those of a text are neighbours.
    """
    device = hardware.prepare(params.hardware)
    dictionary = dictionary.to(device)
    text = table["text_id"].rle_id().cast(pl.Int64).to_torch()
    language, numbers = codes(table["language"], languages).to(device), text.to(device)
    rows = table["row"].to_torch()

    counter = Counter(languages, dictionary.latents, device)
    with Progress(f"encode {hookpoint}", len(rows), "tokens") as progress:
        for start, end in whole_texts(text, params.encode.chunk_tokens):
            values, indices = dictionary.encode(activations.gather(rows[start:end]).to(device))
            counter.add(values, indices, language[start:end], numbers[start:end])
            progress.update(end - start)
    texts = table.group_by("text_id", "language").len("tokens")
    return counter.frame(layer_of(hookpoint)), totals(texts, languages)
