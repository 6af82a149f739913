"""Stage `stability`: which features an SAE trained from another seed finds again, and whether they fire alike."""

import logging
from collections.abc import Iterator

import polars as pl
import torch

from babelscope import sae
from babelscope.activations.store import ActivationStore, place
from babelscope.config import Config
from babelscope.core import stage
from babelscope.core.errors import UserError
from babelscope.core.files import read_table, write_atomically, write_json
from babelscope.core.paths import Paths
from babelscope.core.progress import Progress
from babelscope.features.stability import Overlap, partners, with_baseline
from babelscope.models import hardware

# Tokens encoded at once, which bounds the memory.
_CHUNK = 8192
SCHEMA = pl.Schema({
    "hookpoint": pl.String, "unit": pl.Int32, "language": pl.String,
    "partner": pl.Int32, "cosine": pl.Float64, "overlap": pl.Float64,
    "others": pl.Int64, "others_share": pl.Float64, "others_cosine": pl.Float64, "others_overlap": pl.Float64,
})  # fmt: skip
log = logging.getLogger(__name__)


def run(params: Config, paths: Paths) -> None:
    """Write `paths.stability` and the stage's metrics."""
    features = read_table(paths.features).filter(kind="sae").select("hookpoint", "unit", "language")
    threshold = params.stability.cosine
    parts = [pl.DataFrame(schema=SCHEMA)]
    for hookpoint in params.stability.hookpoints:
        found = with_baseline(features.filter(hookpoint=hookpoint), latents(params, paths, hookpoint), threshold)
        parts.append(found.select(pl.col(name).cast(dtype) for name, dtype in SCHEMA.items()))
    table = pl.concat(parts)
    write_atomically(paths.stability, table.write_parquet)
    numbers = figures(table, threshold)
    write_json(paths.metrics("stability"), numbers)
    report(table, numbers, threshold)


def latents(params: Config, paths: Paths, hookpoint: str) -> pl.DataFrame:
    """All latents of the first SAE: `unit`, `tokens` (train split), `partner`, `cosine`, `overlap` (held-out split)."""
    counts = paths.counts(hookpoint)
    if not counts.is_file():
        raise UserError(f"{counts}: no such file; run `dvc repro encode@{hookpoint}`")
    device = hardware.prepare(params.hardware)
    first, second = (sae.load(folder, hookpoint).to(device) for folder in (paths.saes, paths.saes_again))
    cosine, partner = partners(first.W_dec, second.W_dec)
    activations = ActivationStore(place(paths.activations, first.input_name(hookpoint)))
    overlap = Overlap(partner, second.latents)
    held_out = read_table(paths.tokens).filter(split="eval")["row"].to_torch()
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
        }
    ).with_columns(pl.col("overlap").fill_nan(None))
    tokens = read_table(counts, columns=["unit", "tokens"]).group_by("unit").agg(pl.col("tokens").sum())
    return found.join(tokens, on="unit", how="left").with_columns(pl.col("tokens").fill_null(0))


def groups(table: pl.DataFrame) -> Iterator[tuple[str, pl.DataFrame]]:
    """The rows of all features, of each hookpoint and of each language, each with the suffix of its keys."""
    yield "", table.unique(["hookpoint", "unit"], maintain_order=True)  # languages may share a feature
    for (hookpoint,), rows in table.group_by("hookpoint", maintain_order=True):
        yield f"/{hookpoint}", rows.unique("unit", maintain_order=True)
    for (language,), rows in table.group_by("language", maintain_order=True):
        yield f"/{language}", rows


def figures(table: pl.DataFrame, threshold: float) -> dict[str, float]:
    """For each group of `groups`: the number of features, the share found again, and means."""
    numbers: dict[str, float] = {}
    for group, rows in groups(table):
        numbers[f"stability_features{group}"] = len(rows)
        means = {
            "share": (rows["cosine"] >= threshold).mean(),
            "cosine": rows["cosine"].mean(),
            "overlap": rows["overlap"].mean(),
            "share_others": rows["others_share"].mean(),
            "cosine_others": rows["others_cosine"].mean(),
            "overlap_others": rows["others_overlap"].mean(),
        }
        numbers |= {f"stability_{name}{group}": mean for name, mean in means.items() if isinstance(mean, float)}
    return numbers


def report(table: pl.DataFrame, numbers: dict[str, float], threshold: float) -> None:
    """Log a line per group: features (other latents in parentheses)."""
    if table.is_empty():
        log.info("stability: nothing to compare (params.yaml: stability.hookpoints)")
        return
    columns = ("share", "share_others", "cosine", "cosine_others", "overlap", "overlap_others")
    head = [f"cosine >= {threshold:g}", "features", *(f"{name} (others)" for name in ("found", "cosine", "overlap"))]
    lines = []
    for group, rows in groups(table):
        shown = [f"{numbers.get(f'stability_{name}{group}', float('nan')):.3f}" for name in columns]
        pairs = (f"{own} ({others})" for own, others in zip(shown[::2], shown[1::2], strict=True))
        lines.append([group[1:] or "all", len(rows), *pairs])
    stage.table(head, lines)
