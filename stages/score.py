"""Stage `score`: which features belong to which language, and which neurons where `neurons.hookpoints` names any."""

import logging
import math
from collections.abc import Mapping
from pathlib import Path

import polars as pl

from babelscope import config
from babelscope.config import schema
from babelscope.core import stage
from babelscope.core.errors import UserError
from babelscope.core.files import read_json, read_table, scan_table, write_atomically, write_json
from babelscope.features import lape, monolinguality, sae_lape, similarity
from babelscope.scoring import summary

log = logging.getLogger(__name__)

COUNTS, NEURONS = Path("data/counts"), Path("data/neurons")
FEATURES, METRICS = Path("data/scores/features.parquet"), Path("metrics/score.json")
SIMILARITY = Path("data/scores/similarity.parquet")
KEY = ["hookpoint", "layer", "unit"]
COLUMNS = ["kind", *KEY, "language", "probability", "entropy", "members", "monolinguality", "rank"]


def main() -> None:
    params = config.load()
    places = {COUNTS / f"{name}.totals.parquet": f"encode@{name}" for name in params.hookpoints}
    if params.neurons.hookpoints:
        places[NEURONS / "totals.parquet"] = "neurons"
    totals = read_totals(places, params.languages)
    counts = [scan_counts(COUNTS, name) for name in params.hookpoints]
    selected = sae_lape(pl.concat(counts), totals, **params.score.model_dump())
    features = with_monolinguality(selected, counts, totals).with_columns(kind=pl.lit("sae")).select(COLUMNS)
    every = sae_lape(pl.concat(counts), totals, **params.score.model_dump() | {"members": None, "top": None})
    shared = dict(every.unique(KEY).group_by("members").len().iter_rows())
    content = numbers(features, counts, params.languages, "features")
    content |= {f"shared_by/{k}": shared.get(k, 0) for k in range(1, len(params.languages) + 1)}
    advice = "a lower score.example_rate or token_rate finds more"
    report(features, params.languages, "features", advice)
    if params.neurons.hookpoints:
        neurons, units, there = select_neurons(params.neurons, totals)
        content |= numbers(neurons, there, params.languages, "neurons") | {"neurons_counted": units}
        report(neurons, params.languages, "neurons", "a lower neurons.quantile or a higher top_rate finds more")
        features = pl.concat([features, neurons])
    write_atomically(FEATURES, features.write_parquet)
    write_atomically(SIMILARITY, similarity(every, params.languages).write_parquet)
    write_json(METRICS, content)


def select_neurons(section: schema.Neurons, totals: pl.DataFrame) -> tuple[pl.DataFrame, int, list[pl.LazyFrame]]:
    """The languages' neurons, of how many they were taken, and the counts of each hookpoint."""
    counts = [scan_counts(NEURONS, name) for name in section.hookpoints]
    widths = read_json(NEURONS / "widths.json")
    units = sum(widths[name] for name in section.hookpoints)
    selected = lape(pl.concat(counts), totals, units=units, quantile=section.quantile, top_rate=section.top_rate)
    neurons = with_monolinguality(selected, counts, totals).with_columns(kind=pl.lit("neuron")).select(COLUMNS)
    return neurons, units, counts


def scan_counts(folder: Path, hookpoint: str) -> pl.LazyFrame:
    return scan_table(folder / f"{hookpoint}.parquet").select(
        pl.lit(hookpoint).alias("hookpoint"), "layer", "unit", "language", "tokens", "texts", "sum"
    )


def read_totals(places: Mapping[Path, str], languages: list[str]) -> pl.DataFrame:
    """Tokens and texts per language, in the order of `languages`: the same in every file, or some are stale.

    `places` are the files and the stages that write them.
    """
    first: tuple[Path, pl.DataFrame] | None = None
    for path, writer in places.items():
        totals = read_table(path, columns=["language", "tokens", "texts"])
        if sorted(totals["language"]) != sorted(languages):
            raise UserError(f"{path}: its languages are not those of params.yaml; run `dvc repro {writer}`")
        totals = totals.sort(pl.col("language").cast(pl.Enum(languages)))
        if first is None:
            first = path, totals
        elif not totals.equals(first[1]):
            raise UserError(f"{path}: other totals than in {first[0]}: one of the two is stale; run `dvc repro`")
    assert first is not None  # config allows no empty list of hookpoints
    return first[1]


def with_monolinguality(features: pl.DataFrame, counts: list[pl.LazyFrame], totals: pl.DataFrame) -> pl.DataFrame:
    """`features` with `monolinguality`, in the same order."""
    nu = monolinguality(pl.concat(counts), totals, features)
    return features.join(nu, on=[*KEY, "language"], how="left", maintain_order="left")


def numbers(
    features: pl.DataFrame, counts: list[pl.LazyFrame], languages: list[str], what: str
) -> dict[str, int | float]:
    """How many units the languages own; every key names `what` they are, but for the means over features.

    `effective_languages` is e to the mean entropy: 1 for units that fire in one language, n for units that fire at the
    same rate in n languages.
    """
    layers = pl.concat([frame.select(pl.col("layer").unique()) for frame in counts]).collect(engine="in-memory")
    owned, units = summary(features, languages), features.unique(KEY)
    by_layer = dict(units.group_by("layer").len().iter_rows())
    content: dict[str, int | float] = {what: len(units), f"languages_without_{what}": int((owned["units"] == 0).sum())}
    content |= {f"{what}/{language}": count for language, count in owned.select("language", "units").iter_rows()}
    content |= {f"{what}_in_layer/{layer}": by_layer.get(layer, 0) for layer in sorted(set(layers["layer"]))}
    for name in ("entropy", "probability", "monolinguality"):
        mean = features[name].mean()
        if isinstance(mean, float):  # without features there is no mean
            content[f"mean_{name}" if what == "features" else f"{what}_mean_{name}"] = mean
    effective = "effective_languages" if what == "features" else f"{what}_effective_languages"
    if len(features):
        content[effective] = math.exp(features["entropy"].mean())  # type: ignore[arg-type]
    for language, entropy in owned.drop_nulls("mean_entropy").select("language", "mean_entropy").iter_rows():
        content[f"{effective}/{language}"] = math.exp(entropy)
    return content


def report(features: pl.DataFrame, languages: list[str], what: str, advice: str) -> None:
    owned = summary(features, languages)
    every = len(features.unique(KEY)), features["entropy"].mean(), features["probability"].mean()
    stage.table(
        ["language", what, "effective languages", "mean entropy", "mean probability"],
        [
            [language, units, *((f"{math.exp(h):.2f}", f"{h:.4f}", f"{p:.4f}") if units else "---")]
            for language, units, h, p in [*owned.iter_rows(), ("all", *every)]
        ],
    )
    without = owned.filter(units=0)["language"].to_list()
    if without:
        log.warning("no %s: %s (%s)", what, ", ".join(without), advice)


if __name__ == "__main__":
    stage.run(main)
