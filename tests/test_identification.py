"""Language identification and the measures of agreement."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F  # noqa: N812

from babelscope.core.errors import UserError
from babelscope.core.paths import Paths
from babelscope.corpus.lid import FastText
from babelscope.evaluation import identify
from babelscope.identification import unit_totals
from babelscope.identification.metrics import accuracy, by_source, confusion, f1, figures, mcnemar
from babelscope.identification.run import write
from babelscope.sae.autoencoder import SAE

# Units that the languages own in the paper (Andrylie et al. 2025, released results).
FEATURES = dict(bul=50, zho=24, eng=7, fra=11, deu=13, hin=115, ita=18, jpn=33, kor=22, por=54, rus=26, spa=5, tha=64,
                tur=61, vie=37)  # fmt: skip
NEURONS = dict(bul=348, zho=128, eng=48, fra=246, deu=270, hin=254, ita=279, jpn=189, kor=133, por=253, rus=138,
               spa=191, tha=180, tur=282, vie=130)  # fmt: skip


def wili(classifier: str) -> pl.DataFrame:
    return pl.read_csv(Path(__file__).parent / "figures" / "wili.csv").filter(classifier=classifier)


@pytest.mark.parametrize(("classifier", "owned", "ties"), [("sae-count", FEATURES, 4), ("neuron-count", NEURONS, 0)])
def test_raw_totals_give_every_prediction_of_the_paper_but_for_ties(
    classifier: str, owned: dict[str, int], ties: int
) -> None:
    texts = wili(classifier)
    found = identify(texts, owned, normalize="none")
    assert found.columns == ["classifier", "label", "idx", "paper_prediction", "predicted", "score"]
    others = texts.with_columns(found["predicted"], found["score"]).filter(
        pl.col("predicted") != pl.col("paper_prediction")
    )
    assert len(others) == ties
    for row in others.iter_rows(named=True):  # the paper takes the first by name
        assert row[row["paper_prediction"]] == row["score"] and row["paper_prediction"] < row["predicted"]


@pytest.mark.parametrize(
    ("classifier", "owned", "raw", "per_unit"),
    [("sae-count", FEATURES, 368 + 3, 371), ("neuron-count", NEURONS, 231, 373)],
)
def test_dividing_by_the_units_owned(classifier: str, owned: dict[str, int], raw: int, per_unit: int) -> None:
    texts = wili(classifier)
    assert len(texts) == 379
    right = {
        normalize: accuracy(texts["label"], identify(texts, owned, normalize=normalize)["predicted"])
        for normalize in ("none", "units")
    }
    assert right == {"none": raw / 379, "units": per_unit / 379}


def test_scores_ties_and_silent_texts() -> None:
    texts = pl.DataFrame({"text_id": ["x", "y", "z"], "a": [4, 3, 0], "b": [2, 3, 0], "c": [9, 9, 9]})
    owned = {"a": 4, "b": 2, "c": 0}
    assert identify(texts, owned).rows() == [("x", "b", 1.0), ("y", "b", 1.5), ("z", "b", 0.0)]
    assert identify(texts, owned, normalize="none").rows() == [("x", "a", 4.0), ("y", "b", 3.0), ("z", "b", 0.0)]
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
    with pytest.raises(UserError, match="rename yours"):
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
    assert f1(TRUTH, GUESS, ["a", "b", "c"]) == {"a": 2 * 2 / (3 + 3), "b": 2 * 1 / (2 + 2), "c": 0.0}
    assert confusion(TRUTH, GUESS, ["a", "b"]).rows() == [("a", "a", 2), ("a", "b", 1), ("b", "a", 0), ("b", "b", 1)]
    with pytest.raises(UserError, match="6 values against 1"):
        accuracy(TRUTH, GUESS.head(1))


def test_mcnemar_is_the_exact_binomial_test() -> None:
    def test(b: int, c: int) -> float:
        return mcnemar(pl.Series([True] * b + [False] * c), pl.Series([False] * b + [True] * c))

    def exact(b: int, c: int) -> float:
        return 1.0 if b == c else min(1.0, 2 * sum(math.comb(b + c, i) for i in range(min(b, c) + 1)) / 2 ** (b + c))

    assert test(0, 5) == pytest.approx(2 / 32, rel=1e-12)
    assert test(1, 4) == pytest.approx(2 * (1 + 5) / 32, rel=1e-12)
    assert test(2, 3) == test(3, 2) == 1.0
    assert mcnemar(pl.Series([True, False]), pl.Series([True, False])) == 1.0
    assert test(62, 26) == pytest.approx(0.00015714867, abs=1e-10)
    for b in (0, 1, 7, 40, 250):
        for c in (1, 3, 7, 60, 400):
            assert test(b, c) == pytest.approx(exact(b, c), rel=1e-12)


def test_figures_of_every_classifier_and_the_comparison_on_the_texts_that_both_know() -> None:
    truth = ["a", "a", "b", "c"]
    ours = [(str(i), t, "ours", "units", p) for i, (t, p) in enumerate(zip(truth, ["a", "b", "b", "c"], strict=True))]
    base = [(str(i), t, "base", "none", p) for i, (t, p) in enumerate(zip(truth[:3], ["a", "a", "a"], strict=True))]
    names = ["text_id", "language", "method", "normalize", "predicted"]
    numbers = figures(pl.DataFrame(ours + base, schema=names, orient="row"), ["a", "b", "c"], "base")
    assert numbers["accuracy/ours/units"] == 3 / 4 and numbers["accuracy/base/none"] == 2 / 3
    assert numbers["f1/ours/units/a"] == pytest.approx(2 / 3) and "f1/base/none/c" not in numbers
    assert numbers["macro_f1/base/none"] == pytest.approx((4 / 5 + 0) / 2)
    assert numbers["mcnemar_p/ours/units"] == 1.0 and "mcnemar_p/base/none" not in numbers


def test_fasttext_is_restricted_to_the_languages_that_it_can_tell_apart() -> None:
    lid = FastText()
    assert len(lid.labels) == 176
    known, refused = lid.match(["pt-BR", "nb", "zh-CN", "zh-TW", "tlh"])
    assert known == {"pt": "pt-BR", "no": "nb"}
    assert set(refused) == {"zh-CN", "zh-TW", "tlh"} and "does not tell it from zh-TW" in refused["zh-CN"]
    texts = ["Die Datei konnte nicht\ngefunden werden.", "Não foi possível abrir o arquivo.", ""]
    assert lid.predict(texts)["predicted"].to_list()[:2] == ["de", "pt"]
    assert lid.predict(texts, known)["predicted"].to_list()[1] == "pt-BR"
    assert set(lid.predict(texts, known)["predicted"]) <= {"pt-BR", "nb"}
    with pytest.raises(UserError, match="fastText knows none of them"):
        lid.predict(texts, {})


@pytest.mark.parametrize(
    ("languages", "labels"),
    [
        (["eng_Latn", "zho_Hans", "arb_Arab", "pbt_Arab", "nob_Latn"], ["en", "zh", "ar", "ps", "no"]),
        (["als", "gsw", "hbs", "fil", "iw", "sr-Latn"], ["sq", "als", "sh", "tl", "he", "sr"]),
        (["zh-TW", "yue", "wuu", "lzh"], ["zh", "yue", "wuu", None]),
        (["fa", "prs", "nb", "no", "hi-Latn"], [None] * 5),
    ],
)
def test_fasttext_s_labels_are_found_from_any_code(languages: list[str], labels: list[str | None]) -> None:
    known, refused = FastText().match(languages)
    found = {name: label for label, name in known.items()}
    assert [found.get(name) for name in languages] == labels
    assert set(refused) == {name for name, label in zip(languages, labels, strict=True) if label is None}


NUMBER = {
    "en": "This is the text number",
    "de": "Das hier ist der Text Nummer",
    "zh-CN": "这是文本第",
    "zh-TW": "這是文本第",
}


def identified(languages: list[str], root: Path) -> tuple[Any, dict[str, float]]:
    """What the stage writes of texts in `languages`, whose units are right but for Chinese: all of it is zh-CN."""
    texts = [(f"{name}{i}", name, "ab"[i // 3], f"{NUMBER[name]} {i}.") for name in languages for i in range(5)]
    frame = pl.DataFrame(texts, schema=["text_id", "language", "source", "text"], orient="row")
    owner = [languages.index(name if name != "zh-TW" else "zh-CN") for name in frame["language"]]
    totals = {"sae-count": F.one_hot(torch.tensor(owner), len(languages)).double()}
    features = pl.DataFrame({"kind": "sae", "language": languages, "unit": range(len(languages))})
    numbers = write("", frame, totals, features, FastText(), SimpleNamespace(languages=languages), Paths(root))
    return pl.read_parquet(root / "data/identify/predictions.parquet"), numbers


def test_both_are_asked_about_the_same_texts_and_languages(tmp_path: Path) -> None:
    predictions, numbers = identified(["en", "zh-CN", "de", "zh-TW"], tmp_path)
    asked = predictions.group_by("method", "normalize").agg(pl.col("text_id").sort())["text_id"].to_list()
    assert len(asked) == 3 and all(ids == [f"{name}{i}" for name in ("de", "en") for i in range(5)] for ids in asked)
    assert set(predictions["predicted"]) == {"en", "de"}
    assert numbers["texts"] == 10 and numbers["languages"] == 2
    for method in ("sae-count/units", "fasttext/none"):
        assert numbers[f"accuracy/{method}"] == numbers[f"macro_f1/{method}"] == 1.0
    assert numbers["mcnemar_p/sae-count/units"] == 1.0
    assert numbers["source/a/texts"] == 6 and numbers["source/b/accuracy/sae-count/units"] == 1.0
    # What the units make of Chinese is said, too, by itself.
    assert numbers["all_languages/accuracy/sae-count/units"] == 15 / 20 and numbers["all_languages/texts"] == 20
    assert not any(key.startswith("all_languages/") and "fasttext" in key for key in numbers)
    assert set(pl.read_parquet(tmp_path / "data/identify/confusion.parquet")["language"]) == {"en", "de"}


def test_without_two_languages_that_fasttext_knows_the_units_are_alone(tmp_path: Path) -> None:
    predictions, numbers = identified(["en", "zh-CN", "zh-TW"], tmp_path)
    assert set(predictions["method"]) == {"sae-count"} and len(set(predictions["text_id"])) == 15
    assert numbers["accuracy/sae-count/units"] == 10 / 15 and numbers["texts"] == 15
    assert not any("fasttext" in key or "mcnemar" in key or "all_languages" in key for key in numbers)


def test_each_source_of_texts_has_its_own_accuracy() -> None:
    source = pl.DataFrame({"text_id": list("stuv"), "source": ["x/a", "x/a", "x/a", "y"]})
    columns = {"text_id": list("stuv"), "language": ["de", "de", "en", "en"], "predicted": ["de", "en", "en", "de"]}
    predictions = pl.DataFrame(columns).with_columns(method=pl.lit("ours"), normalize=pl.lit("none"))
    numbers = {"source/x/a/accuracy/ours/none": 2 / 3, "source/x/a/texts": 3,
               "source/y/accuracy/ours/none": 0.0, "source/y/texts": 1}  # fmt: skip
    assert by_source(predictions, source) == numbers
    assert by_source(predictions.head(3), source.head(3)) == {}


def test_totals_are_those_of_a_loop_over_tokens_and_units() -> None:
    g = torch.Generator().manual_seed(0)
    weights = torch.randn(12, 6, generator=g)
    dictionary = SAE(weights, weights, torch.zeros(12), torch.zeros(6), 3)
    features = pl.DataFrame({"unit": [7, 2, 2, 9], "language": ["b", "a", "b", "a"]})
    counts = features.with_columns(min_positive=pl.Series([0.1, 0.2, 0.3, 0.4]), max=pl.Series([2.0, 3.0, 4.0, 5.0]))
    neurons = pl.DataFrame({"unit": [5, 0], "language": ["a", "b"]})
    owners = {"m": unit_totals.owned(features, counts, ["a", "b"]), "n": unit_totals.owned(neurons, None, ["a", "b"])}
    x, text = torch.randn(20, 6, generator=g), torch.randint(0, 3, (20,), generator=g)
    found = unit_totals.UnitTotals(3, owners, {"m": dictionary})
    for part in (slice(0, 7), slice(7, 20)):
        found.add("m", x[part], text[part])
        found.add("n", x[part], text[part])
    expected = {name: torch.zeros(3, 2, dtype=torch.float64) for name in found.totals}
    values, indices = dictionary.encode(x)
    for token in range(20):
        active = {int(u): float(v) for v, u in zip(values[token], indices[token], strict=True) if v > 0}
        for unit, language, low, high in counts.iter_rows():
            if unit in active:
                expected["sae-count"][text[token], "ab".index(language)] += 1
                expected["sae-min-max"][text[token], "ab".index(language)] += (active[unit] - low) / (high - low + 1e-6)
        for unit, language in neurons.iter_rows():
            expected["neuron-count"][text[token], "ab".index(language)] += float(x[token, unit] > 0)
    assert set(found.totals) == {"sae-count", "sae-min-max", "neuron-count"}
    assert all(torch.allclose(found.totals[name], expected[name], atol=1e-5) for name in expected)
    with pytest.raises(UserError, match="dvc repro score"):
        unit_totals.owned(features, counts.head(2), ["a", "b"])
