"""Stages `baselines` and `dictionary`: the formulas by hand, and the stages on a tiny model."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from test_browse_stage import browse, folder  # noqa: F401
from test_neurons_stages import LANGUAGES, SAE_AT, corpus, model, set_params, stage  # noqa: F401

from babelscope import config, sae
from babelscope.activations import store
from babelscope.baselines import dictionaries, directions, intervals, removal, run
from babelscope.baselines.repeats import alike
from babelscope.core.errors import UserError
from babelscope.core.paths import Paths
from babelscope.features import sae_lape
from babelscope.sae.training import loop

TEXTS = np.array([[2.0, 0.0], [4.0, 0.0], [0.0, 1.0], [0.0, 3.0]])
CODES = np.array([0, 0, 1, 1])


def test_difference_of_means() -> None:
    found = directions.diff_mean(TEXTS, CODES, 2)
    # The means are (3, 0) and (0, 2): w = (3, -2) and its negative; w @ own - w @ others = 13.
    assert np.allclose(found.weight, [[3 / 13, -2 / 13], [-3 / 13, 2 / 13]])
    assert np.allclose(found.scores(np.array([[3.0, 0.0], [0.0, 2.0]])), np.eye(2))
    assert np.allclose(found.others, [[0, 2], [3, 0]])
    assert np.allclose(np.linalg.norm(found.directions, axis=1), 1)


def test_languages_count_equally_in_the_mean_of_the_others() -> None:
    x, codes = np.array([[0.0], [0.0], [0.0], [6.0], [3.0]]), np.array([0, 0, 0, 1, 2])
    assert directions.means(x, codes, 3)[1].ravel().tolist() == [4.5, 1.5, 3.0]


def test_principal_component() -> None:
    """The mean of the two halves is (1.5, 1), and the two languages have the same weight."""
    found = directions.component(TEXTS, CODES, 2)
    centred = TEXTS - [1.5, 1.0]
    values, vectors = np.linalg.eigh(centred.T @ centred / 4)
    for row, sign in zip(found.directions, (1, -1), strict=True):
        assert abs(row @ vectors[:, np.argmax(values)]) == pytest.approx(1)
        assert sign * (row @ np.array([3.0, -2.0])) > 0  # towards its own language
    assert np.allclose(found.scores(np.array([[3.0, 0.0], [0.0, 2.0]])), np.eye(2))


def test_the_probe_is_the_logistic_regression_of_scikit_learn() -> None:
    random = np.random.default_rng(0)
    codes = np.repeat(np.arange(3), 40)
    x = random.normal(size=(120, 5)) + np.eye(5)[codes] * 2 * np.array([1, 2, 3, 4, 5])
    ours = directions.probe(x, codes, 3)
    z = (x - x.mean(axis=0)) / x.std(axis=0)
    peer = LogisticRegression(C=1 / (directions._PENALTY * len(x)), max_iter=10_000, tol=1e-8).fit(z, codes)
    theirs = peer.decision_function(z)
    scores = ours.scores(x)
    centred = [table - table.mean(axis=1, keepdims=True) for table in (scores, theirs)]
    assert np.abs(centred[0] - centred[1]).max() < 0.01


def test_accuracies_and_their_differences() -> None:
    right = {"features": np.array([True, True, False, True]), "probe": np.array([True] * 4)}
    found = intervals.accuracies(right, 2000, 0)
    assert found["accuracy"].to_list() == [0.75, 1.0] and found["difference"].to_list() == [0.0, 0.25]
    rows = found.rows_by_key("method", named=True, unique=True)
    assert rows["features"]["difference_low"] == rows["features"]["difference_high"] == 0
    assert rows["probe"]["low"] == rows["probe"]["high"] == 1
    # Of four texts, one of which is wrong: the share of resamples without it is (3/4)^4 = 0.32.
    assert rows["features"]["high"] == 1 and rows["features"]["low"] == 0.25
    assert rows["probe"]["difference_low"] == 0 and rows["probe"]["difference_high"] == 0.75


def test_the_mean_over_languages_has_an_interval() -> None:
    # A quarter of the resamples has the same language twice.
    assert intervals.mean(np.array([0.0, 1.0])) == {"": 0.5, "_low": 0, "_high": 1}
    assert intervals.mean(np.full(5, 0.25)) == {"": 0.25, "_low": 0.25, "_high": 0.25}


def test_effects() -> None:
    change = np.array([[2.0, 4.0, 1.0, np.nan], [0.0, 0.0, 3.0, 3.0]])
    found = intervals.effects([change], np.array([2, 2, 1, 3]), ["a", "a", "b", "b"], ["a", "b"], 500, 0)
    # Own: 6 nats on 4 tokens and 6 on 4; others: 1 on 1 (the other text was not measured) and 0.
    assert found["own"] == pytest.approx((6 / 4 + 6 / 4) / 2)
    assert found["others"] == pytest.approx((1 / 1 + 0) / 2)
    assert found["contrast"] == pytest.approx(found["own"] - found["others"])
    # Text 1 twice: 8 nats on 4 tokens; text 2 twice: 3 nats a token.
    assert found["own_low"] >= (4 / 4 + 6 / 6) / 2 and found["own_high"] <= (8 / 4 + 3) / 2
    assert found["own_low"] < found["own"] < found["own_high"]


def test_saes_are_a_level_of_the_resampling() -> None:
    none = np.array([[0.0, np.nan], [np.nan, 0.0]])
    tokens, language = np.array([1, 1]), ["a", "b"]
    found = intervals.effects([none, none + 1, none + 2], tokens, language, language, 4000, 0)
    # One text of each language, so only the SAEs differ: mean 1, and 27 equally likely resamples with means 0 to 2.
    assert found["own"] == pytest.approx(1) and (found["own_low"], found["own_high"]) == (0, 2)
    alone = intervals.effects([none + 1], tokens, language, language, 400, 0)
    assert alone["own_low"] == alone["own_high"] == 1


def test_the_matrix_of_the_removal_and_the_correlation_of_two() -> None:
    change = np.array([[2.0, 4.0, 1.0, np.nan], [0.0, 0.0, np.nan, np.nan]])
    table = intervals.matrix(change, np.array([2, 2, 1, 3]), ["a", "a", "b", "b"], ["a", "b"])
    assert table[0].tolist() == [6 / 4, 1.0] and table[1, 0] == 0 and np.isnan(table[1, 1])
    assert intervals.correlation(table, -2 * table + 1) == pytest.approx(-1)
    assert intervals.correlation(table, np.zeros((2, 2))) is None
    other = np.array([[1.0, 0.0], [1.0, 5.0]])  # over three cells: (1.5, 1, 0) and (1, 0, 1)
    assert intervals.correlation(table, other) == pytest.approx(np.corrcoef([1.5, 1, 0], [1, 0, 1])[0, 1])


def test_texts_that_both_identify_alike() -> None:
    first, second = pl.Series(["a", "b", None, "b"]), pl.Series(["a", "a", None, "b"])
    assert alike(first, second, pl.Series(["x", "x", "y", "y"])) == {"x": 0.5, "y": 0.5}


def test_without_a_text_of_its_own_no_language_has_an_effect() -> None:
    none = np.zeros(0, dtype=np.int64)
    assert intervals.effects([np.zeros((2, 0))], none, [], ["a", "b"], 10, 0) == {}
    assert intervals.effects([np.array([[np.nan], [1.0]])], np.array([2]), ["a"], ["a", "b"], 10, 0) == {}


def test_a_direction_becomes_that_of_the_others() -> None:
    classifier = directions.diff_mean(TEXTS, CODES, 2)
    change = removal.DirectionAblation(classifier, torch.device("cpu"))
    x = torch.tensor([[5.0, 1.0], [5.0, 1.0]])
    found = change.change(x, torch.tensor([0, 1]))
    w = torch.tensor([3.0, -2.0]) / 13**0.5
    assert torch.allclose(found @ w, torch.tensor([-4.0, 9.0]) / 13**0.5)  # those of (0, 2) and of (3, 0)
    across = torch.tensor([2.0, 3.0])
    assert torch.allclose(found @ across, x @ across)
    assert change.affected_tokens(x).all()


def test_pairs() -> None:
    assert run.pairs(["en", "de", "fr", "pt-BR", "es"]) == [["es", "pt-BR"], ["de", "en"]]


def test_domains_are_those_with_texts_of_every_language_in_both_splits() -> None:
    rows = [(lang, split, d) for lang in "ab" for split in ("train", "eval") for d in ("x", "y")]
    texts = pl.DataFrame([*rows, ("a", "train", "z")], schema=["language", "split", "domain"], orient="row")
    assert run.shared_domains(texts, ["a", "b"]) == ["x", "y"]
    assert run.shared_domains(texts.filter(pl.col("domain") != "y"), ["a", "b"]) == []


class Lid:
    """Takes every text for German."""

    def match(self, languages: Any) -> Any:
        return {name: name for name in languages}, {}

    def predict(self, texts: list[str], among: Any) -> pl.DataFrame:
        return pl.DataFrame({"predicted": ["de"] * len(texts)})


@pytest.fixture
def ready(folder: Path, monkeypatch: Any) -> Paths:  # noqa: F811
    """The folder with texts of two domains, and the stability hookpoint set."""
    monkeypatch.setattr(run, "FastText", Lid)
    sources = pl.when(pl.int_range(pl.len()) % 8 < 4).then(pl.lit("gettext:one")).otherwise(pl.lit("gettext:two"))
    for name in ("texts", "train"):
        corpus().with_columns(source=sources).write_parquet(f"data/corpus/{name}.parquet")
    Path("data/dictionaries").mkdir(exist_ok=True)
    return Paths()


def prepare(**changes: Any) -> None:
    browse()
    content = json.loads(Path("params.yaml").read_text())
    content["stability"]["hookpoints"] = [SAE_AT]
    content["train"] |= {"latents": 64, "k": 3, "tokens": 4096, "batch": 128}
    content["stability"]["seeds"] = [1000, 1001]
    content["baselines"] |= changes
    Path("params.yaml").write_text(json.dumps(content))
    for seed in (1000, 1001):
        stage("retrain", SAE_AT, str(seed))
    stage("stability")


def test_the_stage(ready: Paths) -> None:
    prepare(ablation_tokens=30)
    stage("baselines")
    found = pl.read_parquet("data/baselines/identification.parquet")
    assert set(found["method"]) == {"features", "diff_mean", "component", "probe", "fasttext"}
    settings = [
        ("all", "all"),
        ("all", "one"),
        ("all", "two"),
        *((a, b) for a in ("one", "two") for b in ("one", "two")),
    ]
    assert sorted(set(found.select("trained_on", "evaluated_on").rows())) == sorted(settings)
    assert set(found["languages"]) == {"all", "de/en"}
    everywhere = found.filter(trained_on="all", evaluated_on="all", languages="all")
    rows = everywhere.rows_by_key("method", named=True, unique=True)
    assert rows["fasttext"]["accuracy"] == pytest.approx(1 / 3) and rows["features"]["texts"] == 18
    assert rows["probe"]["accuracy"] > 0.4  # of three languages

    # The features are those of `score`, whose totals `identify` compares, too.
    counts = pl.read_parquet(f"data/counts/{SAE_AT}.parquet")
    params = config.load()
    stored = run.read_stored(SAE_AT, params.languages, ready)
    one = run.trained("features", SAE_AT, stored, params, ready, torch.device("cpu"))
    sums = one.counted.group_by("unit", "language").agg(pl.col("tokens", "texts").sum()).sort("unit", "language")
    assert sums.equals(counts.select("unit", "language", "tokens", "texts").sort("unit", "language"))
    totals = run.selection.totals(stored, "one", LANGUAGES)
    domain = one.counted.filter(domain="one").drop("domain")
    by_hand = sae_lape(domain, totals, **params.score.selection)
    assert run.choose(one, one.counted, "one", 0, params).equals(
        by_hand.select("language", "unit", "probability", "rank")
    )

    transfer = pl.read_parquet("data/baselines/transfer.parquet")
    numbers = json.loads(Path("metrics/baselines.json").read_text())
    part = transfer.filter(selected_on="one", domain="two")
    assert numbers["survive/one/two"] == part["selected"].mean() and numbers["selected/one"] == len(part)
    again = set(run.choose(one, one.counted, "two", 0, params).select("unit", "language").rows())
    assert part.filter("selected").select("unit", "language").rows() == [
        key for key in part.select("unit", "language").rows() if key in again
    ]
    removed = pl.read_parquet("data/baselines/removal.parquet")
    assert set(removed.filter(trained_on="all", evaluated_on="all")["method"]) == {
        "features", "diff_mean", "component", "probe", "features-seed-1000", "features-seed-1001", "features-all-seeds",
    }  # fmt: skip
    assert numbers["own/features-all-seeds"] == pytest.approx(
        np.mean([numbers[f"own/features{end}"] for end in ("", "-seed-1000", "-seed-1001")])
    )
    assert -1 <= numbers["correlation/features-seed-1000"] <= 1 and "correlation/features" not in numbers
    repeats = pl.read_parquet("data/baselines/repeats.parquet").filter(method="features")
    assert repeats["cosine"].null_count() == 3 and numbers["agreement/features"] == pytest.approx(
        repeats["agreement"].mean()
    )
    assert "repeat/features" not in numbers and 0 <= numbers["agreement/probe"] <= 1
    assert numbers["own/diff_mean"] == removed.filter(method="diff_mean", evaluated_on="all")["own"].item()
    assert {f"repeat/{name}" for name in directions.METHODS} <= set(numbers)


def test_dictionaries(ready: Paths) -> None:
    prepare(dictionaries=["frozen_decoder", "frozen_encoder", "random_model", "neurons"], ablation_tokens=20)
    for name in config.load().baselines.dictionaries:
        stage("dictionary", name)
    trained = {name: sae.load(ready.dictionary(name) / "sae", SAE_AT) for name in ("frozen_decoder", "frozen_encoder")}
    other = sae.load(ready.dictionary("frozen_decoder") / "sae_again", SAE_AT)
    # All start from the same directions. Those of the frozen weights are kept, all others move.
    a, b = trained["frozen_decoder"], trained["frozen_encoder"]
    cosine = torch.nn.functional.cosine_similarity
    assert not torch.allclose(cosine(a.W_dec, b.W_dec), torch.ones(64), atol=1e-3)
    assert not torch.allclose(cosine(a.W_dec, other.W_dec), torch.ones(64), atol=1e-3)  # another seed
    own, common = (store.ActivationStore(place / SAE_AT) for place in
                   (ready.dictionary("random_model") / "activations", ready.activations))  # fmt: skip
    rows = torch.arange(common.rows)
    assert own.rows == common.rows and not torch.equal(own.gather(rows), common.gather(rows))
    stage("baselines")
    found = pl.read_parquet("data/baselines/identification.parquet")
    assert {"frozen_decoder", "frozen_encoder", "random_model", "neurons"} <= set(found["method"])
    removed = set(pl.read_parquet("data/baselines/removal.parquet")["method"])
    assert "frozen_decoder" in removed and "neurons" in removed and "random_model" not in removed
    numbers = json.loads(Path("metrics/baselines.json").read_text())
    # Latents of different seeds do not share frozen rows.
    assert numbers["matched/frozen_decoder"] == numbers["matched_high/frozen_encoder"] == 0
    assert (
        numbers["repeat_low/frozen_decoder"] < numbers["repeat/frozen_decoder"] < numbers["repeat_high/frozen_decoder"]
    )
    assert "matched/neurons" not in numbers and "matched/probe" not in numbers


def test_a_killed_dictionary_goes_on_where_it_was(ready: Paths, monkeypatch: Any) -> None:
    prepare(dictionaries=["random_model"])
    stage("dictionary", "random_model")

    def outputs() -> dict[str, bytes]:
        made = ready.dictionary("random_model")
        return {str(file.relative_to(made)): file.read_bytes() for file in sorted(made.rglob("*")) if file.is_file()}

    whole, train, seeds = outputs(), loop.train, []
    assert len(whole) == 8  # a shard and its index, twice three files of an SAE

    def killed(*arguments: Any, seed: int, **options: Any) -> Any:
        seeds.append(seed)
        if len(seeds) == 2:
            raise KeyboardInterrupt
        return train(*arguments, seed=seed, **options)

    monkeypatch.setattr(loop, "train", killed)
    shutil.rmtree(ready.dictionary("random_model"))
    with pytest.raises(KeyboardInterrupt):
        stage("dictionary", "random_model")
    assert not outputs()
    monkeypatch.setattr(dictionaries, "extract", None)
    stage("dictionary", "random_model")
    assert seeds == [0, 1000, 1000] and outputs() == whole
    assert not list(Path(".scratch").glob("dictionary*"))


def test_killed_removals_go_on_where_they_were(ready: Paths, monkeypatch: Any) -> None:
    prepare(ablation_tokens=30)
    stage("baselines")
    whole, nlls, measured = Path("data/baselines/removal.parquet").read_bytes(), removal.ablate, []

    def killed(*arguments: Any, keep: Path, **options: Any) -> Any:
        measured.append(keep.exists())
        if len(measured) == 3:
            raise KeyboardInterrupt
        return nlls(*arguments, keep=keep, **options)

    monkeypatch.setattr(removal, "ablate", killed)
    with pytest.raises(KeyboardInterrupt):
        stage("baselines")
    stage("baselines")
    assert measured[:6] == [False, False, False, True, True, False]
    assert Path("data/baselines/removal.parquet").read_bytes() == whole
    assert not list(Path(".scratch").glob("baselines*"))


def test_a_dictionary_without_units_is_left_out(ready: Paths, monkeypatch: Any, caplog: Any) -> None:
    prepare(dictionaries=["frozen_encoder"], ablation_tokens=20)
    stage("dictionary", "frozen_encoder")
    choose = run.choose

    def none(one: run.Dictionary, *rest: Any) -> pl.DataFrame:
        return choose(one, *rest).clear() if one.name == "frozen_encoder" else choose(one, *rest)

    monkeypatch.setattr(run, "choose", none)
    stage("baselines")
    assert "frozen_encoder: no unit is specific to a language" in caplog.text
    for table in ("identification", "removal", "repeats"):
        found = set(pl.read_parquet(f"data/baselines/{table}.parquet")["method"])
        assert "frozen_encoder" not in found and "diff_mean" in found


def test_without_a_hookpoint_there_is_nothing(ready: Paths) -> None:
    set_params()
    stage("baselines")
    assert pl.read_parquet("data/baselines/identification.parquet").is_empty()
    assert json.loads(Path("metrics/baselines.json").read_text()) == {}


def test_an_unlisted_dictionary_is_refused(ready: Paths) -> None:
    set_params()
    with pytest.raises(UserError, match=r"NAME, one of .*baselines.dictionaries: none"):
        config.load_at_dictionary(["stages/dictionary.py", "frozen_decoder"])


def test_random_weights_keep_their_scale_and_their_ties() -> None:
    layer = torch.nn.Linear(300, 200).requires_grad_(False)
    before, bias = layer.weight.clone(), layer.bias.clone()
    dictionaries.randomise(layer, 0)
    assert not torch.equal(layer.weight, before) and torch.equal(layer.bias, bias)
    assert layer.weight.std() == pytest.approx(float(before.std()), rel=0.02)
    once = layer.weight.clone()
    dictionaries.randomise(layer, 0)
    assert layer.weight.std() == pytest.approx(float(once.std()), rel=0.02)
