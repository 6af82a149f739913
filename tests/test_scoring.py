"""SAE-LAPE, LAPE and monolinguality on cases worked out by hand."""

import math
import os
import subprocess
import sys

import polars as pl
import pytest

from babelscope.core.errors import UserError
from babelscope.features import lape, monolinguality, sae_lape, similarity
from babelscope.scoring import probability_bar, summary

PAPER = {"example_rate": 0.98, "token_rate": 0.1, "ratio": 0.5}
LOOSE = {"example_rate": 0.0, "token_rate": 0.0, "ratio": 0.5}
TOTALS = pl.DataFrame({"language": ["de", "en"], "tokens": [100, 200], "texts": [10, 20]})


def counts(*rows: tuple[int, int, str, int, int]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=["layer", "unit", "language", "tokens", "texts"], orient="row")


def selected(frame: pl.DataFrame) -> list[tuple[str, int, int]]:
    return frame.select("language", "layer", "unit").rows()


def test_probability_entropy_and_members_of_one_feature() -> None:
    found = sae_lape(counts((3, 7, "de", 50, 10), (3, 7, "en", 20, 5)), TOTALS, **PAPER)
    # P = 0.5 and 0.1, so P' = 5/6 and 1/6
    entropy = -(5 / 6 * math.log(5 / 6) + 1 / 6 * math.log(1 / 6))
    assert found.select("language", "layer", "unit", "probability", "members", "rank").rows() == [
        ("de", 3, 7, 0.5, 1, 1)
    ]
    assert found["entropy"].item() == pytest.approx(entropy, abs=1e-11)


def test_a_unit_of_one_language_has_entropy_zero() -> None:
    entropy = sae_lape(counts((0, 0, "en", 200, 20)), TOTALS, **PAPER)["entropy"].item()
    assert entropy == 0.0 and math.copysign(1, entropy) == 1


@pytest.mark.parametrize(("texts", "found"), [(18, 0), (19, 1), (20, 1)])
def test_the_example_limit_truncates_and_is_met_by_equality(texts: int, found: int) -> None:
    # int(0.98 * 20) = int(19.6) = 19
    assert len(sae_lape(counts((0, 0, "en", 100, texts)), TOTALS, **PAPER)) == found


@pytest.mark.parametrize(("tokens", "found"), [(20, 0), (21, 1)])
def test_the_token_limit_is_met_only_above(tokens: int, found: int) -> None:
    assert len(sae_lape(counts((0, 0, "en", tokens, 20)), TOTALS, **PAPER)) == found


@pytest.mark.parametrize(("rate", "total", "limit"), [(0.29, 100, 28), (0.57, 100, 56), (0.98, 50, 49)])
def test_limits_are_those_of_python_floats(rate: float, total: int, limit: int) -> None:
    assert int(rate * total) == limit  # 0.29 * 100 is 28.999999999999996
    totals = pl.DataFrame({"language": ["x"], "tokens": [1000], "texts": [total]})
    rates = {"example_rate": rate, "token_rate": 0.0, "ratio": 0.5}
    assert len(sae_lape(counts((0, 0, "x", 500, limit)), totals, **rates)) == 1
    assert len(sae_lape(counts((0, 0, "x", 500, limit - 1)), totals, **rates)) == 0


def test_the_limits_may_be_met_by_different_languages_unless_asked_otherwise() -> None:
    # de: all texts but 10 of 100 tokens (not > 10); en: 30 of 200 tokens, but 3 of 20 texts
    frame = counts((0, 0, "de", 10, 10), (0, 0, "en", 30, 3))
    assert selected(sae_lape(frame, TOTALS, **PAPER | {"ratio": 0.9})) == [("en", 0, 0)]
    assert len(sae_lape(frame, TOTALS, **PAPER | {"ratio": 0.9}, same_language=True)) == 0


def test_a_language_of_one_text_does_not_let_every_unit_pass() -> None:
    totals = TOTALS.with_columns(texts=pl.Series([1, 20]))  # int(0.98 * 1) = 0
    frame = counts((0, 0, "en", 30, 3), (0, 1, "en", 30, 19), (0, 2, "de", 20, 1), (0, 3, "de", 20, 0))
    for same_language in (False, True):
        found = sae_lape(frame, totals, **PAPER, same_language=same_language)
        assert selected(found) == [("de", 0, 2), ("en", 0, 1)]


def test_an_example_rate_of_0_leaves_the_texts_out() -> None:
    frame = counts((0, 0, "en", 30, 0))
    assert selected(sae_lape(frame, TOTALS, **PAPER | {"example_rate": 0.0})) == [("en", 0, 0)]
    assert len(sae_lape(frame, TOTALS, **PAPER | {"example_rate": 0.001})) == 0


def test_without_texts_only_tokens_count() -> None:
    frame = counts((0, 0, "en", 30, 0)).drop("texts")
    assert selected(sae_lape(frame, TOTALS.drop("texts"), **PAPER)) == [("en", 0, 0)]


def test_members_include_equality_and_shared_units_stand_once_per_member() -> None:
    frame = counts((0, 1, "de", 40, 10), (0, 1, "en", 40, 20), (0, 2, "de", 40, 10), (0, 2, "en", 39, 20))
    # unit 1: 0.4 and 0.2 = 0.5 * 0.4, two members; unit 2: 0.4 and 0.195, one
    assert selected(sae_lape(frame, TOTALS, **PAPER)) == [("de", 0, 2)]
    shared = sae_lape(frame, TOTALS, **PAPER, members=2)
    assert shared.select("language", "unit", "probability", "members").rows() == [("de", 1, 0.4, 2), ("en", 1, 0.2, 2)]
    assert sae_lape(frame, TOTALS, **PAPER, members=3).is_empty()
    every = sae_lape(frame, TOTALS, **PAPER, members=None)
    assert set(every["members"]) == {1, 2}
    for count in (1, 2):
        alone = sae_lape(frame, TOTALS, **PAPER, members=count)
        assert every.filter(members=count).drop("rank").equals(alone.drop("rank"))


RANKED = counts(
    (1, 5, "de", 60, 10), (1, 5, "en", 6, 2),
    (1, 4, "de", 50, 10),
    (0, 9, "de", 50, 10),
    (0, 8, "de", 90, 10), (0, 8, "en", 36, 2),
)  # fmt: skip


def test_order_by_entropy_breaks_ties_by_layer_and_unit() -> None:
    assert sae_lape(RANKED, TOTALS, **PAPER).select("layer", "unit", "rank").rows() == [
        (0, 9, 1), (1, 4, 2), (1, 5, 3), (0, 8, 4),
    ]  # fmt: skip


def test_probabilities_are_correctly_rounded_with_one_language() -> None:
    frame = counts(*((0, tokens, "x", tokens, 1) for tokens in range(1, 50))).drop("texts")
    found = sae_lape(frame, pl.DataFrame({"language": ["x"], "tokens": [49]}), **LOOSE, order="probability")
    assert found["probability"].to_list() == [tokens / 49 for tokens in range(49, 0, -1)]


def test_order_by_probability_and_top() -> None:
    ranked = sae_lape(RANKED, TOTALS, **PAPER, order="probability", top=3)
    assert ranked.select("layer", "unit").rows() == [(0, 8), (1, 5), (0, 9)]


def test_per_layer_ranks_and_cuts_within_each_layer() -> None:
    ranked = sae_lape(RANKED, TOTALS, **PAPER, per_layer=True)
    assert ranked.select("layer", "unit", "rank").rows() == [(0, 9, 1), (0, 8, 2), (1, 4, 1), (1, 5, 2)]
    assert sae_lape(RANKED, TOTALS, **PAPER, per_layer=True, top=1).select("layer", "unit").rows() == [(0, 9), (1, 4)]


def test_proportional_counts_tie_although_their_floating_point_sums_differ() -> None:
    totals = pl.DataFrame({"language": list("abc"), "tokens": [999, 999, 999]})
    rows = [(0, 10 - k, lang, c * k, 1) for k in range(1, 10) for lang, c in (("a", 97), ("b", 7), ("c", 3))]
    found = sae_lape(counts(*rows).drop("texts"), totals, **LOOSE)
    assert found["entropy"].n_unique() == 1
    assert found["unit"].to_list() == sorted(found["unit"])


def test_two_hookpoints_may_share_a_layer() -> None:
    frame = pl.concat(
        [
            counts((0, 0, "de", 50, 10)).with_columns(hookpoint=pl.lit("layers.0.mlp")),
            counts((0, 0, "en", 90, 20), (0, 0, "de", 5, 1)).with_columns(hookpoint=pl.lit("layers.0")),
        ]
    )
    found = sae_lape(frame, TOTALS, **PAPER)
    assert found.select("language", "hookpoint").rows() == [("de", "layers.0.mlp"), ("en", "layers.0")]
    with pytest.raises(UserError, match="more than one row for layer 0, unit 0, language de"):
        sae_lape(frame.drop("hookpoint"), TOTALS, **PAPER)


def test_languages_follow_the_totals_and_summary_has_a_row_for_each() -> None:
    frame = counts((0, 0, "en", 90, 20), (0, 1, "en", 90, 20), (0, 2, "de", 90, 10))
    found = sae_lape(frame, TOTALS.reverse(), **PAPER)
    assert found["language"].to_list() == ["en", "en", "de"]
    assert summary(found, ["de", "fi", "en"]).rows() == [
        ("de", 1, 0.0, 0.9),
        ("fi", 0, None, None),
        ("en", 2, 0.0, 0.45),
    ]


def test_lazy_categorical_and_empty_counts_give_the_same_columns() -> None:
    frame = counts((0, 0, "en", 90, 20), (1, 0, "de", 90, 10))
    plain = sae_lape(frame, TOTALS, **PAPER)
    assert sae_lape(frame.lazy(), TOTALS, **PAPER).equals(plain)
    assert sae_lape(frame.cast({"language": pl.Categorical}), TOTALS, **PAPER).equals(plain)
    empty = sae_lape(frame.head(0), TOTALS, **PAPER)
    assert empty.is_empty() and empty.schema == plain.schema


def test_max_entropy_cuts_exactly() -> None:
    # Unit 0 fires in de alone (H = 0), unit 1 with P' = 5/6, 1/6 (H = 0.4506), unit 2 equally in both (H = ln 2).
    rows = [
        (0, 0, "de", 50, 10),
        (0, 1, "de", 50, 10),
        (0, 1, "en", 20, 5),
        (0, 2, "de", 50, 10),
        (0, 2, "en", 100, 20),
    ]
    frame = counts(*rows)
    middle = -(5 / 6 * math.log(5 / 6) + 1 / 6 * math.log(1 / 6))

    def units(limit: float | None) -> list[int]:
        return sae_lape(frame, TOTALS, **PAPER, members=None, max_entropy=limit)["unit"].unique().sort().to_list()

    assert units(None) == units(math.log(2)) == [0, 1, 2]
    assert units(math.log(2) - 1e-9) == units(middle) == [0, 1]
    assert units(middle - 1e-9) == units(0.0) == [0]
    every = sae_lape(frame, TOTALS, **PAPER, members=None)
    assert sae_lape(frame, TOTALS, **PAPER, members=None, max_entropy=None).equals(every)
    kept = sae_lape(frame, TOTALS, **PAPER, members=None, max_entropy=middle)
    assert kept.equals(every.filter(pl.col("unit") < 2))  # members, ranks and values of the others stay


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"example_rate": 1.5}, "example_rate: 1.5"),
        ({"token_rate": -0.1}, "token_rate"),
        ({"ratio": 0.0}, "ratio"),
        ({"members": 0}, "members"),
        ({"max_entropy": -0.1}, "max_entropy: -0.1 is not at least 0 nats"),
        ({"max_entropy": math.nan}, "max_entropy"),
        ({"top": 0}, "top"),
        ({"order": "frequency"}, "allowed: entropy, probability"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        sae_lape(RANKED, TOTALS, **PAPER | change)


def test_wrong_frames_are_named() -> None:
    with pytest.raises(UserError, match="counts: no column tokens"):
        sae_lape(RANKED.drop("tokens"), TOTALS, **PAPER)
    with pytest.raises(UserError, match="totals: no column texts"):
        sae_lape(RANKED, TOTALS.drop("texts"), **PAPER)
    with pytest.raises(UserError, match="no totals for fr"):
        sae_lape(counts((0, 0, "fr", 5, 1)), TOTALS, **PAPER)
    with pytest.raises(UserError, match="de has more than one row"):
        sae_lape(RANKED, pl.concat([TOTALS, TOTALS.head(1)]), **PAPER)
    with pytest.raises(UserError, match="unit 0 fires on 101 tokens of 100 in de"):
        sae_lape(counts((0, 0, "de", 101, 10)), TOTALS, **PAPER)


def test_the_bar_counts_units_that_never_fire() -> None:
    frame = counts((0, 0, "de", 10, 1), (0, 1, "de", 20, 1), (0, 1, "en", 60, 1)).drop("texts")
    # 3 units x 2 languages: 0 0 0 0.1 0.2 0.3
    for quantile, bar in ((0.0, 0.0), (0.5, 0.0), (4 / 6, 0.1), (5 / 6, 0.2), (1.0, 0.3)):
        assert probability_bar(frame, TOTALS, units=3, quantile=quantile) == bar
    with pytest.raises(UserError, match="units: 1 units in all, but the counts hold 2"):
        probability_bar(frame, TOTALS, units=1)


def test_lape_owns_strictly_above_the_bar_and_keeps_the_lowest_entropies() -> None:
    frame = counts(
        (0, 0, "de", 90, 1), (0, 0, "en", 180, 1),  # 0.9 0.9: both languages, entropy ln 2
        (0, 1, "de", 80, 1), (0, 1, "en", 10, 1),  # 0.8 0.05
        (0, 2, "de", 20, 1),  # entropy 0, but nowhere above the bar
        (0, 3, "en", 100, 1), (0, 3, "de", 20, 1),  # 0.5 0.2
    ).drop("texts")  # fmt: skip
    # 10 units: 20 values, 13 of them 0; then 0.05 0.2 0.2 0.5 0.8 0.9 0.9; the 16th is 0.2
    found = lape(frame, TOTALS, units=10, quantile=0.8, top_rate=0.3)
    assert found.select("language", "unit", "members", "rank").rows() == [
        ("de", 1, 1, 1), ("de", 0, 2, 2), ("en", 3, 1, 1), ("en", 0, 2, 2),
    ]  # fmt: skip
    assert found["entropy"].max() == pytest.approx(math.log(2))
    assert set(lape(frame, TOTALS, units=10, quantile=0.8, top_rate=0.1)["unit"]) == {1}
    assert lape(frame, TOTALS, units=10, quantile=0.8, top_rate=0.0).is_empty()


def test_monolinguality_is_per_token_and_counts_silent_languages() -> None:
    totals = pl.DataFrame({"language": ["a", "b", "c"], "tokens": [10, 20, 40]})
    frame = counts((0, 0, "a", 5, 1), (0, 0, "b", 2, 1), (1, 3, "c", 4, 1)).with_columns(
        sum=pl.Series([30.0, 8.0, 20.0])
    )
    # unit (0, 0): means 3, 0.4, 0; unit (1, 3): 0, 0, 0.5
    nu = monolinguality(frame, totals)
    assert nu.select("language", "layer", "unit").rows() == [("a", 0, 0), ("b", 0, 0), ("c", 1, 3)]
    assert nu["monolinguality"].to_list() == pytest.approx([3 - 0.2, 0.4 - 1.5, 0.5])


def test_monolinguality_ranks_descending_and_leaves_out_languages_without_tokens() -> None:
    totals = pl.DataFrame({"language": ["a", "b", "empty"], "tokens": [10, 10, 0]})
    frame = counts((0, 0, "a", 5, 1), (0, 1, "a", 5, 1), (0, 1, "b", 5, 1)).with_columns(
        sum=pl.Series([10.0, 30.0, 5.0])
    )
    nu = monolinguality(frame, totals)
    assert nu.select("language", "unit", "monolinguality").rows() == [("a", 1, 2.5), ("a", 0, 1.0), ("b", 1, -2.5)]


def test_scoring_imports_no_torch() -> None:
    code = "import sys, babelscope.scoring, babelscope.evaluation; sys.exit('torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0


def test_similarity_is_the_jaccard_index_of_two_languages_units():
    candidates = pl.DataFrame(
        [("a", 1), ("b", 1), ("a", 2), ("a", 3), ("b", 3), ("b", 4), ("b", 5)],
        schema={"language": pl.String, "unit": pl.Int32}, orient="row",
    ).with_columns(layer=pl.lit(0, pl.Int32))  # fmt: skip
    found = similarity(candidates, ["b", "a", "c", "d"])
    assert found.columns == ["language", "other", "units", "jaccard"]
    assert found.select("language", "other").rows() == [(x, y) for x in "bacd" for y in "bacd"]
    cells = {(x, y): (units, jaccard) for x, y, units, jaccard in found.rows()}
    assert cells["a", "b"] == cells["b", "a"] == (2, 2 / 5)
    assert cells["a", "a"] == (3, 1.0) and cells["b", "b"] == (4, 1.0)
    assert cells["a", "c"] == (0, 0.0) and cells["c", "d"] == (0, None)
