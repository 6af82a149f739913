"""Stage `score`: which features belong to which language."""

import logging
from pathlib import Path

import polars as pl

from babelscope import config, stage
from babelscope.errors import UserError
from babelscope.files import write_atomically, write_json
from babelscope.scoring import monolinguality, sae_lape, summary

log = logging.getLogger(__name__)

COUNTS, FEATURES, METRICS = Path("data/counts"), Path("data/scores/features.parquet"), Path("metrics/score.json")
KEY = ["hookpoint", "layer", "unit"]
COLUMNS = ["kind", *KEY, "language", "probability", "entropy", "members", "monolinguality", "rank"]


def main() -> None:
    params = config.load()
    totals = read_totals(params.hookpoints, params.languages)
    counts = [scan_counts(hookpoint) for hookpoint in params.hookpoints]
    selected = sae_lape(pl.concat(counts), totals, **params.score.model_dump())
    features = with_monolinguality(selected, counts, totals).with_columns(kind=pl.lit("sae")).select(COLUMNS)
    layers = pl.concat([frame.select(pl.col("layer").unique()) for frame in counts]).collect(engine="in-memory")
    owned = summary(features, params.languages)
    write_atomically(FEATURES, features.write_parquet)
    write_json(METRICS, numbers(features, owned, sorted(set(layers["layer"]))))
    report(owned)


def scan_counts(hookpoint: str) -> pl.LazyFrame:
    path = COUNTS / f"{hookpoint}.parquet"
    if not path.is_file():
        raise UserError(f"{path}: no such file; run `dvc repro encode@{hookpoint}`")
    return pl.scan_parquet(path).select(
        pl.lit(hookpoint).alias("hookpoint"), "layer", "unit", "language", "tokens", "texts", "sum"
    )


def read_totals(hookpoints: list[str], languages: list[str]) -> pl.DataFrame:
    """Tokens and texts per language, in the order of `languages`: the same for every hookpoint, or some are stale."""
    first: tuple[Path, pl.DataFrame] | None = None
    for hookpoint in hookpoints:
        path = COUNTS / f"{hookpoint}.totals.parquet"
        if not path.is_file():
            raise UserError(f"{path}: no such file; run `dvc repro encode@{hookpoint}`")
        totals = pl.read_parquet(path, columns=["language", "tokens", "texts"])
        if sorted(totals["language"]) != sorted(languages):
            raise UserError(f"{path}: its languages are not those of params.yaml; run `dvc repro encode@{hookpoint}`")
        totals = totals.sort(pl.col("language").cast(pl.Enum(languages)))
        if first is None:
            first = path, totals
        elif not totals.equals(first[1]):
            raise UserError(f"{path}: other totals than in {first[0]}: one of the two is stale; run `dvc repro encode`")
    assert first is not None  # config allows no empty list of hookpoints
    return first[1]


def with_monolinguality(features: pl.DataFrame, counts: list[pl.LazyFrame], totals: pl.DataFrame) -> pl.DataFrame:
    """`features` with `monolinguality`, in the same order; one hookpoint's counts are in memory at a time."""
    units = features.select(KEY).unique().lazy()
    rows = [frame.join(units, on=KEY, how="semi").collect(engine="in-memory") for frame in counts]
    nu = monolinguality(pl.concat(rows), totals)
    return features.join(nu, on=[*KEY, "language"], how="left", maintain_order="left")


def numbers(features: pl.DataFrame, owned: pl.DataFrame, layers: list[int]) -> dict[str, int | float]:
    units = features.unique(KEY)
    by_layer = dict(units.group_by("layer").len().iter_rows())
    content: dict[str, int | float] = {
        "features": len(units),
        "languages_without_features": int((owned["units"] == 0).sum()),
    }
    content |= {f"features/{language}": count for language, count in owned.select("language", "units").iter_rows()}
    content |= {f"features_in_layer/{layer}": by_layer.get(layer, 0) for layer in layers}
    for name in ("entropy", "probability", "monolinguality"):
        mean = features[name].mean()
        if isinstance(mean, float):  # without features there is no mean
            content[f"mean_{name}"] = mean
    return content


def report(owned: pl.DataFrame) -> None:
    log.info("%-10s %8s %14s %17s", "language", "features", "mean entropy", "mean probability")
    for language, units, entropy, probability in owned.iter_rows():
        means = f"{entropy:14.4f} {probability:17.4f}" if units else f"{'-':>14} {'-':>17}"
        log.info("%-10s %8d %s", language, units, means)
    without = owned.filter(units=0)["language"].to_list()
    if without:
        log.warning("no features: %s (a lower score.example_rate or token_rate finds more)", ", ".join(without))


if __name__ == "__main__":
    stage.run(main)
