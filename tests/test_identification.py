"""Language identification and the measures of agreement."""

from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from babelscope.errors import UserError
from babelscope.evaluation import identify
from babelscope.evaluation.agreement import accuracy, confusion, macro_f1, mcnemar, per_language

# Units that the languages own in the paper (Andrylie et al. 2025, released results).
FEATURES = dict(bul=50, zho=24, eng=7, fra=11, deu=13, hin=115, ita=18, jpn=33, kor=22, por=54, rus=26, spa=5, tha=64,
                tur=61, vie=37)  # fmt: skip
NEURONS = dict(bul=348, zho=128, eng=48, fra=246, deu=270, hin=254, ita=279, jpn=189, kor=133, por=253, rus=138,
               spa=191, tha=180, tur=282, vie=130)  # fmt: skip


def wili(classifier: str) -> pl.DataFrame:
    return pl.read_csv(Path(__file__).parent / "figures" / "wili.csv").filter(classifier=classifier)


@pytest.mark.parametrize(("classifier", "owned"), [("sae-count", FEATURES), ("neuron-count", NEURONS)])
def test_raw_totals_give_every_prediction_of_the_paper(classifier: str, owned: dict[str, int]) -> None:
    found = identify(wili(classifier), owned, normalize="none", ties="first")
    assert found["predicted"].to_list() == found["paper_prediction"].to_list()
    assert found.columns == ["classifier", "label", "idx", "paper_prediction", "predicted", "score"]


@pytest.mark.parametrize(
    ("classifier", "owned", "raw", "per_unit"), [("sae-count", FEATURES, 368, 371), ("neuron-count", NEURONS, 231, 373)]
)
def test_dividing_by_the_units_owned(classifier: str, owned: dict[str, int], raw: int, per_unit: int) -> None:
    texts = wili(classifier)
    assert len(texts) == 379
    right = {
        normalize: accuracy(texts["label"], identify(texts, owned, normalize=normalize, ties="first")["predicted"])
        for normalize in ("none", "units")
    }
    assert right == {"none": raw / 379, "units": per_unit / 379}


def test_three_ties_go_to_spanish_that_owns_fewer_features_than_english() -> None:
    texts = wili("sae-count")
    predicted = identify(texts, FEATURES, normalize="none")["predicted"]
    assert accuracy(texts["label"], predicted) == (368 + 3) / 379


def test_scores_ties_and_silent_texts() -> None:
    texts = pl.DataFrame({"text_id": ["x", "y", "z"], "a": [4, 3, 0], "b": [2, 3, 0], "c": [9, 9, 9]})
    owned = {"a": 4, "b": 2, "c": 0}
    assert identify(texts, owned).rows() == [("x", "b", 1.0), ("y", "b", 1.5), ("z", "b", 0.0)]
    assert identify(texts, owned, normalize="none").rows() == [("x", "a", 4.0), ("y", "b", 3.0), ("z", "b", 0.0)]
    assert identify(texts, owned, ties="first")["predicted"].to_list() == ["a", "b", "a"]
    assert identify(texts, {"b": 2, "a": 2, "c": 0}, normalize="none")["predicted"].to_list() == ["a", "a", "a"]


def test_long_and_wide_counts_and_both_forms_of_units_owned_are_the_same() -> None:
    wide = pl.DataFrame({"text_id": ["x", "y"], "language": ["a", "b"], "a": [4, 0], "b": [0, 2]})
    owned = pl.DataFrame({"language": ["a", "b"], "units": [2, 1]})
    expected = [("x", "a", "a", 2.0), ("y", "b", "b", 2.0)]
    assert identify(wide, owned).rows() == expected
    long = pl.DataFrame({"text_id": ["x", "y"], "truth": ["a", "b"], "language": ["a", "b"], "count": [4, 2]})
    assert identify(long, {"a": 2, "b": 1}).rows() == expected


def test_what_cannot_be_identified_is_named() -> None:
    texts = pl.DataFrame({"text_id": ["x"], "a": [1]})
    with pytest.raises(UserError, match="no column for b"):
        identify(texts, {"a": 1, "b": 1})
    with pytest.raises(UserError, match="no language owns a unit"):
        identify(texts, {"a": 0})
    with pytest.raises(UserError, match="normalize: 'texts'; allowed: units, none"):
        identify(texts, {"a": 1}, normalize="texts")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="rename them"):
        identify(texts.with_columns(score=1), {"a": 1})
    with pytest.raises(UserError, match="neither a column per language"):
        identify(texts, {"q": 1})


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(*[st.integers(0, 6)] * 3), min_size=1, max_size=8),
    st.tuples(*[st.integers(0, 4)] * 3).filter(any),
    st.sampled_from(["units", "none"]),
)
def test_identify_agrees_with_a_loop(rows: list[tuple[int, int, int]], units: tuple[int, int, int], norm: str) -> None:
    owned = dict(zip("abc", units, strict=True))
    expected = []
    for row in rows:
        score = {k: n / (owned[k] if norm == "units" else 1) for k, n in zip("abc", row, strict=True) if owned[k]}
        best = min(score, key=lambda k: (-score[k], owned[k], k))
        expected.append((best, score[best]))
    texts = pl.DataFrame(rows, schema=list("abc"), orient="row").with_row_index("text_id")
    assert identify(texts, owned, normalize=norm).select("predicted", "score").rows() == expected  # type: ignore[arg-type]


TRUTH, GUESS = pl.Series(["a", "a", "a", "b", "b", "c"]), pl.Series(["a", "a", "b", "b", None, "a"])


def test_agreement_by_hand() -> None:
    assert accuracy(TRUTH, GUESS) == 3 / 6
    table = per_language(TRUTH, GUESS, ["a", "b", "c"])
    assert table.rows() == [
        ("a", 3, 3, 2, 2 / 3, 2 / 3, 2 / 3),
        ("b", 2, 2, 1, 1 / 2, 1 / 2, 1 / 2),
        ("c", 1, 0, 0, 0.0, 0.0, 0.0),
    ]
    assert macro_f1(TRUTH, GUESS, ["a", "b", "c"]) == pytest.approx((2 / 3 + 1 / 2) / 3)
    assert confusion(TRUTH, GUESS, ["a", "b"]).rows() == [("a", "a", 2), ("a", "b", 1), ("b", "a", 0), ("b", "b", 1)]
    with pytest.raises(UserError, match="6 values against 1"):
        accuracy(TRUTH, GUESS.head(1))


def test_mcnemar_is_the_exact_binomial_test() -> None:
    def test(b: int, c: int) -> tuple[int, int, float]:
        return tuple(mcnemar(pl.Series([True] * b + [False] * c), pl.Series([False] * b + [True] * c)))  # type: ignore[return-value]

    assert test(0, 5) == (0, 5, 2 / 32)
    assert test(1, 4) == (1, 4, 2 * (1 + 5) / 32)
    assert test(2, 3) == test(3, 2)[1::-1] + (1.0,)
    assert mcnemar(pl.Series([True, False]), pl.Series([True, False])) == (0, 0, 1.0)
    assert test(62, 26)[2] == pytest.approx(0.00015714867, abs=1e-10)  # SciPy: binomtest(26, 88).pvalue
