"""Stage `score`: which features belong to which language, and which neurons if `neurons.hookpoints` names any."""

import logging
import math
from collections.abc import Mapping
from pathlib import Path

import polars as pl

from babelscope.config import Config, schema
from babelscope.core import stage
from babelscope.core.errors import UserError
from babelscope.core.files import read_json, read_table, scan_table, write_atomically, write_json
from babelscope.core.paths import Paths
from babelscope.features import lape, monolinguality, sae_lape, similarity, summary

log = logging.getLogger(__name__)

KEY = ["hookpoint", "layer", "unit"]
COLUMNS = ["kind", *KEY, "language", "probability", "entropy", "members", "monolinguality", "rank"]


def run(params: Config, paths: Paths) -> None:
    """Write `paths.features`, `paths.similarity` and the stage's metrics."""
    writers = {paths.totals(name): "extend" for name in params.hookpoints}
    if params.neurons.hookpoints:
        writers[paths.neurons / "totals.parquet"] = "neurons"
    totals = read_totals(writers, params.languages)
    counts = [scan_counts(paths.counts(name), name) for name in params.hookpoints]
    section = params.score.selection
    selected, alike = sae_lape(pl.concat(counts), totals, **section), None
    if params.score.random_tokens:
        from babelscope.features import random_tokens  # its imports take seconds, and by default it is off

        random = random_tokens.firing(params, paths, paths.saes, params.hookpoints)
        others = random_tokens.without(pl.concat(counts), totals, random, params.score.ratio)
        alike = selected.join(others.select(KEY).unique().collect(), on=KEY, how="anti")
        selected = sae_lape(others, totals, **section)
    features = select(selected, counts, totals, "sae")
    every = {"members": None, "max_entropy": None, "top": None}
    candidates = sae_lape(pl.concat(counts), totals, **section | every)
    shared = dict(candidates.unique(KEY).group_by("members").len().iter_rows())
    content = numbers(features, counts, params.languages, "features")
    if alike is not None:
        content["features_on_random_tokens"] = alike.n_unique(KEY)
        log.info("%d features fire on random tokens as on their language, and are left out", alike.n_unique(KEY))
    content |= {f"shared_by/{k}": shared.get(k, 0) for k in range(1, len(params.languages) + 1)}
    limit = "" if params.score.max_entropy is None else ", or a higher max_entropy,"
    report(features, params.languages, "features", f"a lower score.example_rate or token_rate{limit} finds more")
    if params.neurons.hookpoints:
        neurons, units, counted = select_neurons(params.neurons, paths.neurons, totals)
        content |= numbers(neurons, counted, params.languages, "neurons") | {"neurons_counted": units}
        report(neurons, params.languages, "neurons", "a lower neurons.quantile or a higher top_rate finds more")
        features = pl.concat([features, neurons])
    write_atomically(paths.features, features.write_parquet)
    write_atomically(paths.similarity, similarity(candidates, params.languages).write_parquet)
    write_json(paths.metrics("score"), content)


def select_neurons(
    section: schema.Neurons, folder: Path, totals: pl.DataFrame
) -> tuple[pl.DataFrame, int, list[pl.LazyFrame]]:
    """The selected neurons, the number of all neurons, and the counts of each hookpoint in `folder`."""
    counts = [scan_counts(folder / f"{name}.parquet", name) for name in section.hookpoints]
    widths = read_json(folder / "widths.json")
    units = sum(widths[name] for name in section.hookpoints)
    selected = lape(pl.concat(counts), totals, units=units, quantile=section.quantile, top_rate=section.top_rate)
    return select(selected, counts, totals, "neuron"), units, counts


def scan_counts(path: Path, hookpoint: str) -> pl.LazyFrame:
    """A lazy frame of the counts of one hookpoint, with its name."""
    return scan_table(path).select(
        pl.lit(hookpoint).alias("hookpoint"), "layer", "unit", "language", "tokens", "texts", "sum"
    )


def read_totals(writers: Mapping[Path, str], languages: list[str]) -> pl.DataFrame:
    """Tokens and texts per language, in the order of `languages`.

    Parameters
    ----------
    writers: the stage that writes each file.

    Raises
    ------
    UserError: the files differ, or a file has other languages, so that it is stale.
    """
    first: tuple[Path, pl.DataFrame] | None = None
    for path, writer in writers.items():
        totals = read_table(path, columns=["language", "tokens", "texts"])
        if sorted(totals["language"]) != sorted(languages):
            raise UserError(f"{path}: its languages are not those of params.yaml; run `dvc repro {writer}`")
        totals = totals.sort(pl.col("language").cast(pl.Enum(languages)))
        first = first or (path, totals)
        if not totals.equals(first[1]):
            raise UserError(f"{path}: other totals than in {first[0]}: one of the two is stale; run `dvc repro`")
    assert first is not None  # config allows no empty list of hookpoints
    return first[1]


def select(selected: pl.DataFrame, counts: list[pl.LazyFrame], totals: pl.DataFrame, kind: str) -> pl.DataFrame:
    """`selected` with `kind` and `monolinguality`, in the same order."""
    nu = monolinguality(pl.concat(counts), totals, selected)
    found = selected.join(nu, on=[*KEY, "language"], how="left", maintain_order="left")
    return found.with_columns(kind=pl.lit(kind)).select(COLUMNS)


def numbers(
    features: pl.DataFrame, counts: list[pl.LazyFrame], languages: list[str], what: str
) -> dict[str, int | float]:
    """How many units the languages own. Keys contain `what` the units are, except for means over features.

    `effective_languages` is e to the mean entropy: 1 for units that fire in one language, n for units that fire at the
    same rate in n languages. `effective_languages_median` is the median of e to the entropy.
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
        content[f"{effective}_median"] = features["entropy"].exp().median()  # type: ignore[assignment]
    for language, entropy in owned.drop_nulls("mean_entropy").select("language", "mean_entropy").iter_rows():
        content[f"{effective}/{language}"] = math.exp(entropy)
        median = features.filter(language=language)["entropy"].exp().median()
        content[f"{effective}_median/{language}"] = median  # type: ignore[assignment]
    return content


def report(features: pl.DataFrame, languages: list[str], what: str, advice: str) -> None:
    """Log a line per language, and a warning if some languages have none."""
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
