"""Published figures, reproduced (tests/figures/README.md names the sources)."""

from pathlib import Path

import polars as pl
import pytest

from babelscope.features import lape, sae_lape
from babelscope.scoring import probability_bar

FIGURES = Path(__file__).parent / "figures"


def excerpt(name: str, languages: list[str]) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """Counts, totals and the units with what is published about them; a cell is `tokens` or `tokens/texts`."""
    table = pl.read_csv(FIGURES / f"{name}.csv", infer_schema=False).fill_null("")
    split = pl.col("cell").str.split_exact("/", 1).struct.rename_fields(["tokens", "texts"])
    long = (
        table.unpivot(languages, index=["layer", "unit"], variable_name="language", value_name="cell")
        .with_columns(split.alias("split"))
        .unnest("split")
        .with_columns(pl.col("tokens", "texts").cast(pl.Int64))
    )
    totals = long.filter(layer="").select("language", "tokens", "texts")
    counts = long.filter((pl.col("layer") != "") & (pl.col("tokens") > 0)).drop("cell")
    counts = counts.cast({"layer": pl.Int64, "unit": pl.Int64})
    units = table.filter(pl.col("layer") != "").drop(languages).cast({"layer": pl.Int64, "unit": pl.Int64})
    if counts["texts"].null_count() == len(counts):
        return counts.drop("texts"), totals.drop("texts"), units
    return counts, totals, units


def owners(found: pl.DataFrame, units: pl.DataFrame) -> list[str]:
    """Per unit, the languages that own it, joined by `+`."""
    named = found.group_by("layer", "unit").agg(pl.col("language").sort().str.join("+"))
    return (
        units.join(named, on=["layer", "unit"], how="left", maintain_order="left")["language"].fill_null("").to_list()
    )


def test_the_sixteen_published_features() -> None:
    header = (FIGURES / "exact16.csv").read_text(encoding="utf-8").splitlines()[0].split(",")
    counts, totals, units = excerpt("exact16", header[5:])
    found = sae_lape(counts, totals, example_rate=0.98, token_rate=0.1, ratio=0.5)
    assert len(found) == 16
    own = units.join(found, on=["layer", "unit"], suffix="_found")
    assert own["language"].to_list() == own["own"].to_list()
    assert own["entropy_found"].round(3).to_list() == own["entropy"].cast(pl.Float64).to_list()
    assert own["probability_found"].round(2).to_list() == own["probability"].cast(pl.Float64).to_list()


@pytest.mark.parametrize(
    ("case", "ratio", "example_rate", "members"),
    [
        ("all", 0.5, 0.98, 1),
        ("ratio_0.8", 0.8, 0.98, 1),
        ("rate_0.9", 0.5, 0.9, 1),
        ("shared2", 0.5, 0.98, 2),
        ("shared3", 0.5, 0.98, 3),
        ("sharedK", 0.5, 0.98, 5),
    ],
)
def test_the_selection_of_the_papers_code(case: str, ratio: float, example_rate: float, members: int) -> None:
    counts, totals, units = excerpt("synth5", [f"L{i:02}" for i in range(5)])
    found = sae_lape(counts, totals, example_rate=example_rate, token_rate=0.1, ratio=ratio, members=members)
    assert owners(found, units) == units[case].to_list()
    assert units[case].n_unique() >= 2


def test_the_selection_of_the_lape_authors_code() -> None:
    counts, totals, units = excerpt("mgpt", ["en", "de", "tr"])
    # The bar of all 196,608 neurons is the probability of neuron (0, 1506) in German: here, too, by its own rank.
    bar = counts.filter(layer=0, unit=1506, language="de").join(totals, on="language")
    bar_probability = (bar["tokens"] / bar["tokens_right"]).item()
    assert bar_probability == pytest.approx(0.7509200572967529, abs=1e-7)
    probabilities = counts.join(totals, on="language").select(pl.col("tokens") / pl.col("tokens_right"))["tokens"]
    size = 3 * len(units)
    quantile = (size - int((probabilities > bar_probability).sum())) / size
    assert probability_bar(counts, totals, units=len(units), quantile=quantile) == bar_probability
    selected = units.filter(pl.col("owners") != "")
    found = lape(counts, totals, units=len(units), quantile=quantile, top_rate=len(selected) / len(units))
    expected = ["+".join(sorted(names.split("+"))) for names in units["owners"]]
    assert owners(found, units) == expected
    assert found["entropy"].max() == pytest.approx(1.094315767288208, abs=2e-5)
