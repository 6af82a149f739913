"""Stage `encode <hookpoint>`: how often every latent fires on every language of the training split."""

from pathlib import Path

import polars as pl

from babelscope import sae
from babelscope.activations.rows import read_rows
from babelscope.activations.store import opened
from babelscope.config import Config
from babelscope.core import stage
from babelscope.core.files import copy_file, read_table, write_atomically, write_json
from babelscope.core.paths import Paths
from babelscope.core.progress import Progress
from babelscope.features.counter import Counter, totals, whole_texts
from babelscope.models import hardware
from babelscope.models.names import layer_of
from babelscope.models.tokens import codes
from babelscope.sae.metrics import quality


def run(params: Config, paths: Paths, hookpoint: str) -> None:
    """Write `paths.counts(hookpoint)`, `paths.totals(hookpoint)` and the stage's metrics."""
    if params.train.source == "stream":
        copy_file(paths.stream / hookpoint / "counts.parquet", paths.counts(hookpoint))
        copy_file(paths.stream / hookpoint / "totals.parquet", paths.totals(hookpoint))
        counts, by_language = read_table(paths.counts(hookpoint)), read_table(paths.totals(hookpoint))
    else:
        counts, by_language = encode(hookpoint, params, paths, paths.saes)
        write_atomically(paths.counts(hookpoint), counts.write_parquet)
        write_atomically(paths.totals(hookpoint), by_language.write_parquet)
    tokens, fired = int(by_language["tokens"].sum()), counts["unit"].n_unique()
    l0 = int(counts["tokens"].sum()) / tokens
    numbers = {"tokens": tokens, "l0": l0, "latents_fired": fired, "layer": layer_of(hookpoint)}
    numbers |= added(hookpoint, params, paths)
    write_json(paths.metrics("encode", hookpoint), numbers)
    stage.table(["hookpoint", "tokens", "latents that fired", "L0"], [[hookpoint, f"{tokens:,}", fired, f"{l0:.1f}"]])


def added(hookpoint: str, params: Config, paths: Paths) -> dict[str, float]:
    """`fvu/<language>` and `l0/<language>` of the languages that train no SAE, on held-out texts.

    Those of the others are in the figures of stage `train`.
    """
    trained = read_table(paths.tokens, columns=["language"])["language"].unique()
    languages = [name for name in params.languages if name not in trained]
    if not languages:
        return {}
    table = read_rows(paths, languages).filter(split="eval")
    dictionary = sae.load(paths.saes, hookpoint).to(hardware.prepare(params.hardware))
    inputs = opened(paths, dictionary.input_name(hookpoint)) if dictionary.is_transcoder else None
    code, rows = codes(table["language"], languages), table["row"].to_torch()
    found = quality(dictionary, opened(paths, hookpoint), rows, code, len(languages), inputs).figures(languages)
    return {key: value for key, value in found.items() if "/" in key}


def encode(
    hookpoint: str, params: Config, paths: Paths, saes: Path, split: str = "train"
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Encode the stored activations of a split by an SAE in `saes`: counts per language and latent, totals."""
    device = hardware.prepare(params.hardware)
    dictionary = sae.load(saes, hookpoint).to(device)
    activations = opened(paths, dictionary.input_name(hookpoint))
    table = read_rows(paths, params.languages).filter(split=split)
    text = table["text_id"].rle_id().cast(pl.Int64).to_torch()
    language, numbers = codes(table["language"], params.languages).to(device), text.to(device)
    rows = table["row"].to_torch()

    counter = Counter(params.languages, dictionary.latents, device)
    with Progress(f"encode {hookpoint}", len(rows), "tokens") as progress:
        for start, end in whole_texts(text, params.encode.chunk_tokens):
            values, indices = dictionary.encode(activations.gather(rows[start:end]).to(device))
            counter.add(values, indices, language[start:end], numbers[start:end])
            progress.update(end - start)
    texts = table.group_by("text_id", "language").len("tokens")
    return counter.frame(layer_of(hookpoint)), totals(texts, params.languages)
