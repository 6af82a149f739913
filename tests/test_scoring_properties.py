"""The scoring functions against a naive implementation, and what must not change their results."""

import math
from typing import Any

import polars as pl
from hypothesis import given, settings
from hypothesis import strategies as st

from babelscope.features import lape, monolinguality, sae_lape

LANGUAGES = ["en", "de", "tr", "ja"]
UNITS = [(layer, unit) for layer in range(2) for unit in range(4)]
RATES = st.sampled_from([0.0, 0.1, 0.29, 0.5, 0.98, 1.0])

totals_tables = st.fixed_dictionaries({name: st.tuples(st.integers(20, 60), st.integers(0, 10)) for name in LANGUAGES})
cells = st.dictionaries(
    st.tuples(st.sampled_from(UNITS), st.sampled_from(LANGUAGES)), st.tuples(st.integers(1, 20), st.integers(0, 10))
)
arguments = st.fixed_dictionaries(
    {
        "example_rate": RATES,
        "token_rate": RATES,
        "ratio": st.sampled_from([0.2, 0.5, 0.8, 1.0]),
        "members": st.integers(1, 3),
        "max_entropy": st.none() | st.sampled_from([0.0, 0.5, math.log(2), 1.0]),
        "same_language": st.booleans(),
        "order": st.sampled_from(["entropy", "probability"]),
        "top": st.none() | st.integers(1, 3),
        "per_layer": st.booleans(),
    }
)
quick = settings(max_examples=60, deadline=None)
Totals = dict[str, tuple[int, int]]
Cells = dict[tuple[tuple[int, int], str], tuple[int, int]]


def frames(totals: Totals, cells: Cells) -> tuple[pl.DataFrame, pl.DataFrame]:
    rows = [(*unit, name, *value, value[0] * 0.5) for (unit, name), value in cells.items()]
    names = {"layer": pl.Int32, "unit": pl.Int32, "language": pl.String, "tokens": pl.Int64, "texts": pl.Int64}
    counts = pl.DataFrame(rows, schema=names | {"sum": pl.Float64}, orient="row")
    return counts, pl.DataFrame(
        [(name, *value) for name, value in totals.items()], schema=["language", "tokens", "texts"], orient="row"
    )


def naive_entropy(shares: list[float]) -> float:
    return round(-sum(p / sum(shares) * math.log(p / sum(shares)) for p in shares if p) + 0.0, 10)


def naive_sae_lape(totals: Totals, cells: Cells, **kw: Any) -> dict[str, list[tuple[int, int, float, float]]]:
    """Straight from the definition: loops over every unit and language; (layer, unit, P, H) by rank."""
    found: dict[str, list[tuple[int, int, float, float]]] = {name: [] for name in totals}
    for unit in UNITS:
        c = {name: cells.get((unit, name), (0, 0))[0] for name in totals}
        e = {name: cells.get((unit, name), (0, 0))[1] for name in totals}
        if not any(c.values()):
            continue
        many = {name for name, (t, _) in totals.items() if c[name] > int(kw["token_rate"] * t)}
        rate = kw["example_rate"]
        wide = {name for name, (_, n) in totals.items() if e[name] >= (max(1, int(rate * n)) if rate else 0)}
        if not (many & wide if kw["same_language"] else many and wide):
            continue
        p = {name: c[name] / totals[name][0] for name in totals}
        members = [name for name in totals if p[name] >= kw["ratio"] * max(p.values())]
        limit = math.inf if kw["max_entropy"] is None else round(kw["max_entropy"], 10)
        if len(members) == kw["members"] and naive_entropy(list(p.values())) <= limit:
            for name in members:
                found[name].append((*unit, p[name], naive_entropy(list(p.values()))))
    for name, rows in found.items():
        by = (lambda r: r[3]) if kw["order"] == "entropy" else (lambda r: -r[2])
        groups = [[r for r in rows if r[0] == layer] for layer in (0, 1)] if kw["per_layer"] else [rows]
        found[name] = [r for group in groups for r in sorted(group, key=lambda r: (by(r), r[0], r[1]))[: kw["top"]]]
    return found


@quick
@given(totals_tables, cells, arguments)
def test_sae_lape_agrees_with_the_naive_one(totals: Totals, cells: Cells, kw: dict[str, Any]) -> None:
    found = sae_lape(*frames(totals, cells), **kw)
    for name, rows in naive_sae_lape(totals, cells, **kw).items():
        mine = found.filter(language=name)
        assert mine.select("layer", "unit", "probability").rows() == [row[:3] for row in rows]
        assert mine["entropy"].round(10).to_list() == [row[3] for row in rows]


@quick
@given(totals_tables, cells, arguments, st.randoms(use_true_random=False))
def test_the_order_of_rows_changes_no_bit(totals: Totals, cells: Cells, kw: dict[str, Any], random: Any) -> None:
    counts, table = frames(totals, cells)
    places = list(range(len(counts)))
    random.shuffle(places)
    shuffled = counts[places] if places else counts
    assert sae_lape(shuffled, table, **kw).equals(sae_lape(counts, table, **kw))
    assert lape(shuffled, table, units=8, top_rate=0.5).equals(lape(counts, table, units=8, top_rate=0.5))
    assert monolinguality(shuffled, table).equals(monolinguality(counts, table))


@quick
@given(totals_tables, cells, arguments, st.permutations(LANGUAGES))
def test_new_names_for_languages_change_only_names(
    totals: Totals, cells: Cells, kw: dict[str, Any], names: list[str]
) -> None:
    counts, table = frames(totals, cells)
    new = dict(zip(LANGUAGES, names, strict=True))
    rename = pl.col("language").replace_strict(new, return_dtype=pl.String)
    renamed = sae_lape(counts.with_columns(rename), table.with_columns(rename), **kw)
    assert renamed.equals(sae_lape(counts, table, **kw).with_columns(rename))


@quick
@given(totals_tables, cells, arguments, RATES, RATES)
def test_stricter_rates_only_remove_units(
    totals: Totals, cells: Cells, kw: dict[str, Any], example_rate: float, token_rate: float
) -> None:
    counts, table = frames(totals, cells)
    kw |= {"top": None}
    stricter = kw | {
        "example_rate": max(kw["example_rate"], example_rate),
        "token_rate": max(kw["token_rate"], token_rate),
    }
    key = ["language", "layer", "unit"]
    many, few = (set(sae_lape(counts, table, **args).select(key).iter_rows()) for args in (kw, stricter))
    assert few <= many


@quick
@given(totals_tables, cells, st.sampled_from([0.0, 0.5, 0.8, 0.95]), st.sampled_from([0.0, 0.25, 0.5, 1.0]))
def test_lape_agrees_with_the_naive_one(totals: Totals, cells: Cells, quantile: float, top_rate: float) -> None:
    p = {u: {name: cells.get((u, name), (0, 0))[0] / totals[name][0] for name in totals} for u in UNITS}
    flat = sorted(value for row in p.values() for value in row.values())
    bar = flat[max(1, round(quantile * len(flat))) - 1]
    left = [u for u in UNITS if max(p[u].values()) > bar]
    kept = sorted(left, key=lambda u: (naive_entropy(list(p[u].values())), u))[: round(top_rate * len(UNITS))]
    expected = [(name, *u, p[u][name]) for name in totals for u in kept if p[u][name] > bar]
    found = lape(*frames(totals, cells), units=len(UNITS), quantile=quantile, top_rate=top_rate)
    assert found.select("language", "layer", "unit", "probability").rows() == expected


@quick
@given(totals_tables, cells)
def test_monolinguality_agrees_with_the_naive_one(totals: Totals, cells: Cells) -> None:
    mean = {u: {name: cells.get((u, name), (0, 0))[0] * 0.5 / totals[name][0] for name in totals} for u in UNITS}
    nu = monolinguality(*frames(totals, cells))
    assert len(nu) == len(cells)
    for name, layer, unit, value in nu.iter_rows():
        means = mean[layer, unit]
        others = [means[other] for other in totals if other != name]
        assert math.isclose(value, means[name] - sum(others) / len(others), abs_tol=1e-12)
