"""Stage `stability`: which features SAEs trained from other seeds find again, and whether they fire alike.

Each of them is compared with the first SAE. Figures are means over `stability.seeds` and hookpoints.
"""

import logging
import zlib
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from babelscope import sae
from babelscope.activations.rows import read_rows
from babelscope.activations.store import opened
from babelscope.config import Config
from babelscope.core import stage
from babelscope.core.errors import UserError
from babelscope.core.files import read_table, write_atomically, write_json
from babelscope.core.paths import Paths
from babelscope.core.progress import Progress
from babelscope.features import random_tokens, sae_lape, stability
from babelscope.features.run_encode import encode
from babelscope.models import hardware
from babelscope.models.tokens import codes

# Tokens encoded at once, which bounds the memory.
_CHUNK = 8192
# Sets of random latents with which a language's set is compared.
_DRAWS = 200
SCHEMA = pl.Schema({
    "hookpoint": pl.String, "unit": pl.Int32, "language": pl.String,
    "partner": pl.Int32, "cosine": pl.Float64, "overlap": pl.Float64,
    "others": pl.Int64, "others_share": pl.Float64, "others_cosine": pl.Float64, "others_overlap": pl.Float64,
    "matched": pl.Boolean, "encoder_cosine": pl.Float64,
})  # fmt: skip
AGAIN = pl.Schema({
    "hookpoint": pl.String, "seed": pl.Int64, "language": pl.String, "unit": pl.Int32, "probability": pl.Float64,
    "entropy": pl.Float64, "rank": pl.Int64,
})  # fmt: skip
log = logging.getLogger(__name__)


def run(params: Config, paths: Paths) -> None:
    """Write the tables `paths.stability` and `paths.features_again`, and the stage's metrics."""
    features = read_table(paths.features).filter(kind="sae").select("hookpoint", "unit", "language")
    threshold = params.stability.cosine
    schema = SCHEMA | {"by_chance": pl.Boolean, "seed": pl.Int64}
    parts, every, sets = [pl.DataFrame(schema=schema)], [], []
    others = [pl.DataFrame(schema=AGAIN)]
    for hookpoint, seed in product(params.stability.hookpoints, params.stability.seeds):
        own, found = features.filter(hookpoint=hookpoint), latents(params, paths, hookpoint, seed)
        compared = stability.with_baseline(own, found, threshold).with_columns(seed=pl.lit(seed))
        parts.append(compared.select(pl.col(name).cast(dtype) for name, dtype in schema.items()))
        every.append(found)
        again, compared_sets = compare_sets(params, paths, hookpoint, own, seed)
        sets.append(compared_sets)
        again = again.with_columns(hookpoint=pl.lit(hookpoint), seed=pl.lit(seed))
        others.append(again.select(pl.col(name).cast(dtype) for name, dtype in AGAIN.items()))
    table = pl.concat(parts)
    write_atomically(paths.stability, over_seeds(table).write_parquet)
    write_atomically(paths.features_again, pl.concat(others).write_parquet)
    numbers = figures(table, threshold)
    if every:
        names = {"latents_matched_share": "matched", "latents_matched_share_chance": "by_chance",
                 "pw_mcc": "decoder_cosine", "pw_mcc_chance": "chance_cosine"}  # fmt: skip
        means = (pl.col(column).mean().alias(name) for name, column in names.items())
        numbers |= pl.concat(every).select(means).row(0, named=True)
        numbers |= of_sets(sets, params.languages)
    write_json(paths.metrics("stability"), numbers)
    report(table, numbers, threshold)


def over_seeds(table: pl.DataFrame) -> pl.DataFrame:
    """One row per feature: means over the seeds; `matched` in all of them; `partner` in the SAE of the first seed."""
    first, every = pl.col("partner", "others").first(), pl.col("matched").all(ignore_nulls=False)
    means = pl.col([name for name, dtype in SCHEMA.items() if dtype == pl.Float64]).mean()
    grouped = table.group_by("hookpoint", "unit", "language", maintain_order=True)
    return grouped.agg(first, every, means).select(pl.col(name).cast(dtype) for name, dtype in SCHEMA.items())


def latents(params: Config, paths: Paths, hookpoint: str, seed: int) -> pl.DataFrame:
    """All latents of the first SAE: `unit`, `tokens` (train split), `partner`, `cosine`, `overlap` (held-out split).

    With the one-to-one partner: `decoder_cosine`, `encoder_cosine`, and `matched`, whether both reach the threshold.
    With random latents instead of the second SAE's: `chance_cosine` (decoder) and `by_chance`.
    """
    counts = paths.counts(hookpoint)
    if not counts.is_file():
        raise UserError(f"{counts}: no such file; run `dvc repro extend`, which merges the counts")
    device = hardware.prepare(params.hardware)
    first, second = (sae.load(folder, hookpoint).to(device) for folder in (paths.saes, paths.saes_again / str(seed)))
    cosine, partner = stability.partners(first.W_dec, second.W_dec)
    weights, others = ((dictionary.W_dec, dictionary.encoder) for dictionary in (first, second))
    matched = stability.match(weights, others)
    by_chance = stability.match(weights, stability.random_latents(others, params.seed))
    activations = opened(paths, first.input_name(hookpoint))
    overlap = stability.Overlap(partner, second.latents)
    held_out = read_rows(paths, params.languages).filter(split="eval")["row"].to_torch()
    with Progress(f"stability {hookpoint}", len(held_out), "tokens") as progress:
        for rows in torch.split(held_out, _CHUNK):
            x = activations.gather(rows).to(device)
            overlap.add(first.encode(x), second.encode(x))
            progress.update(len(rows))
    found = pl.DataFrame(
        {
            "unit": pl.Series(torch.arange(first.latents).numpy()).cast(pl.Int32),
            "partner": partner.cpu().numpy(),
            "cosine": cosine.cpu().double().numpy(),
            "overlap": overlap.result().cpu().numpy(),
            "decoder_cosine": matched[0].cpu().double().numpy(),
            "encoder_cosine": matched[1].cpu().double().numpy(),
            "matched": (torch.stack(matched) >= params.stability.cosine).all(0).cpu().numpy(),
            "chance_cosine": by_chance[0].cpu().double().numpy(),
            "by_chance": (torch.stack(by_chance) >= params.stability.cosine).all(0).cpu().numpy(),
        }
    ).with_columns(pl.col(pl.Float64).fill_nan(None))
    tokens = read_table(counts, columns=["unit", "tokens"]).group_by("unit").agg(pl.col("tokens").sum())
    return found.join(tokens, on="unit", how="left").with_columns(pl.col("tokens").fill_null(0))


def compare_sets(
    params: Config, paths: Paths, hookpoint: str, features: pl.DataFrame, seed: int
) -> tuple[pl.DataFrame, dict[str, list[Any]]]:
    """Each language's first k features in both SAEs, where k is the number of features in the SAE that has fewer.

    The second SAE's features are selected as `score` selects those of the first (`features`: `unit`, `language`, in
    order of rank). Random sets have k latents of the second SAE that are no features and fire about as often on the
    training split of the language.

    Returns
    -------
    The features of the second SAE. By language, without those that have no features in one of the SAEs: `write_cosine`
    on the held-out split, `subspace_overlap`, and the overlaps of the first set with `_DRAWS` random ones (nan: there
    are too few latents).
    """
    folders = (paths.saes, paths.saes_again / str(seed))
    decoders = [sae.load(folder, hookpoint).W_dec.detach() for folder in folders]

    def counted(folder: Path, split: str) -> tuple[pl.DataFrame, pl.DataFrame]:
        dictionary, rows = sae.load(folder, hookpoint), read_rows(paths, params.languages).filter(split=split)
        activations = opened(paths, dictionary.input_name(hookpoint))
        return encode(hookpoint, dictionary, activations, rows, params.languages, params)

    counts, totals = counted(folders[1], "train")
    if params.score.random_tokens:
        rates = random_tokens.firing(params, paths, folders[1], [hookpoint]).drop("hookpoint")
        counts = random_tokens.without(counts, totals, rates, params.score.ratio).collect()
    again = sae_lape(counts, totals, **params.score.selection)

    def dense(counts: pl.DataFrame, column: str, latents: int) -> NDArray[np.float64]:
        table = np.zeros((len(params.languages), latents))
        table[codes(counts["language"], params.languages), counts["unit"]] = counts[column]
        return table

    tokens = dense(counts, "tokens", len(decoders[1]))
    held_out = [counted(folder, "eval")[0] for folder in folders]
    sums = [dense(table, "sum", len(rows)) for table, rows in zip(held_out, decoders, strict=True)]
    found = {}
    for code, language in enumerate(params.languages):
        sets = [frame.filter(language=language)["unit"].to_list() for frame in (features, again)]
        k = min(map(len, sets))
        if not k:
            continue
        first, second = ((decoders[i][sets[i][:k]], torch.from_numpy(sums[i][code, sets[i][:k]])) for i in (0, 1))
        pool = np.setdiff1d(tokens[code].nonzero()[0], again["unit"])
        random = np.full(_DRAWS, np.nan)
        if len(pool) >= k:
            draw = params.seed + params.stability.seeds.index(seed)
            entropy = [draw, *(zlib.crc32(name.encode()) for name in (hookpoint, language))]
            wanted = np.sort(tokens[code, sets[1][:k]])[::-1]
            drawn = pool[stability.random_sets(tokens[code, pool], wanted, _DRAWS, np.random.default_rng(entropy))]
            random = np.array([stability.subspace_overlap(first[0], decoders[1][units]) for units in drawn])
        overlap = stability.subspace_overlap(first[0], second[0])
        found[language] = [stability.write_cosine(first, second), overlap, random]
    return again, found


def of_sets(sets: list[dict[str, list[Any]]], languages: list[str]) -> dict[str, float]:
    """The figures of `compare_sets`, means over hookpoints and seeds; `random`: mean, 97.5 % quantile."""
    numbers: dict[str, float] = {}
    for language in languages:
        rows = [found[language] for found in sets if language in found]
        if rows:
            write, overlap, random = (np.mean(column, axis=0) for column in zip(*rows, strict=True))
            values = {"write_cosine": write, "subspace_overlap": overlap, "subspace_overlap_random": random.mean(),
                      "subspace_overlap_random_high": np.quantile(random, 0.975)}  # fmt: skip
            numbers |= {f"{name}/{language}": float(value) for name, value in values.items() if np.isfinite(value)}
    return numbers


def groups(table: pl.DataFrame) -> Iterator[tuple[str, pl.DataFrame]]:
    """The rows (one per seed) of all features, of each hookpoint and of each language, and the suffix of their keys."""
    yield "", table.unique(["hookpoint", "unit", "seed"], maintain_order=True)  # languages may share a feature
    for (hookpoint,), rows in table.group_by("hookpoint", maintain_order=True):
        yield f"/{hookpoint}", rows.unique(["unit", "seed"], maintain_order=True)
    for (language,), rows in table.group_by("language", maintain_order=True):
        yield f"/{language}", rows


def count(rows: pl.DataFrame) -> int:
    """The number of features in the rows of all seeds."""
    return len(rows) // max(1, rows["seed"].n_unique())


def figures(table: pl.DataFrame, threshold: float) -> dict[str, float]:
    """For each group of `groups`: the number of features, the share found again, and means."""
    numbers: dict[str, float] = {}
    for group, rows in groups(table):
        numbers[f"stability_features{group}"] = count(rows)
        means = {
            "stability_share": (rows["cosine"] >= threshold).mean(),
            "stability_cosine": rows["cosine"].mean(),
            "stability_overlap": rows["overlap"].mean(),
            "stability_share_others": rows["others_share"].mean(),
            "stability_cosine_others": rows["others_cosine"].mean(),
            "stability_overlap_others": rows["others_overlap"].mean(),
            "features_matched_share": rows["matched"].mean(),
            "features_matched_share_chance": rows["by_chance"].mean(),
        }
        numbers |= {f"{name}{group}": mean for name, mean in means.items() if isinstance(mean, float)}
    return numbers


def report(table: pl.DataFrame, numbers: dict[str, float], threshold: float) -> None:
    """Log a line per group, with the baseline of each figure in parentheses, and one for all latents."""
    if table.is_empty():
        log.info("stability: nothing to compare (params.yaml: stability.hookpoints)")
        return
    pairs = {
        "found (others)": ("stability_share", "stability_share_others"),
        "cosine (others)": ("stability_cosine", "stability_cosine_others"),
        "overlap (others)": ("stability_overlap", "stability_overlap_others"),
        "matched (by chance)": ("features_matched_share", "features_matched_share_chance"),
        "subspace overlap (random, 97.5 %)": ("subspace_overlap", "subspace_overlap_random_high"),
    }

    def shown(key: str) -> str:
        return f"{numbers[key]:.3f}" if key in numbers else "-"

    lines = []
    for group, rows in groups(table):
        cells = [f"{shown(own + group)} ({shown(others + group)})" for own, others in pairs.values()]
        lines.append([group[1:] or "all", count(rows), *cells, shown(f"write_cosine{group}")])
    stage.table([f"cosine >= {threshold:g}", "features", *pairs, "write cosine"], lines)
    names = ("latents_matched_share", "latents_matched_share_chance", "pw_mcc", "pw_mcc_chance")
    every = [numbers[name] for name in names]
    log.info("all latents: matched %.3f (by chance %.3f), PW-MCC %.3f (by chance %.3f)", *every)
