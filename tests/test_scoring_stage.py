"""The stage `score`, run on two small hookpoints."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from babelscope import config
from babelscope.config import schema
from babelscope.core.errors import UserError
from babelscope.core.paths import Paths
from babelscope.features.run_score import run

ROOT = Path(__file__).parent.parent
LOW, HIGH = "layers.2.mlp", "layers.11.mlp"
TOTALS = pl.DataFrame({"language": ["fi", "de", "en"], "tokens": [100, 100, 100], "texts": [10, 10, 10]})


def counts(layer: int, *rows: tuple[int, str, int, int, float]) -> pl.DataFrame:
    frame = pl.DataFrame(rows, schema=["unit", "language", "tokens", "texts", "sum"], orient="row")
    return frame.select(
        pl.lit(layer, pl.Int32).alias("layer"), pl.col("unit").cast(pl.Int32), pl.exclude("unit")
    ).with_columns(max=pl.lit(1.0, pl.Float32), min_positive=pl.lit(0.5, pl.Float32))


@pytest.fixture
def score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    folder = tmp_path / "data" / "counts"
    folder.mkdir(parents=True)
    low = [(0, "en", 50, 9, 100.0), (0, "de", 5, 2, 5.0), (1, "en", 60, 10, 60.0), (2, "en", 3, 3, 9.0)]
    counts(2, *low).write_parquet(folder / f"{LOW}.parquet")
    counts(11, (0, "de", 80, 10, 240.0)).write_parquet(folder / f"{HIGH}.parquet")
    counts(29, (0, "xx", 80, 10, 240.0)).write_parquet(folder / "layers.29.mlp.parquet")  # left over: not listed
    for hookpoint in (LOW, HIGH):
        TOTALS.write_parquet(folder / f"{hookpoint}.totals.parquet")
    monkeypatch.chdir(tmp_path)
    shipped = config.load(ROOT / "params.yaml")
    none = shipped.neurons.model_copy(update={"hookpoints": []})
    changes = {"languages": ["en", "de", "fi"], "hookpoints": [LOW, HIGH], "neurons": none}
    params = shipped.model_copy(update=changes)
    monkeypatch.setattr(config, "load", lambda: params)
    return lambda: run(config.load(), Paths())


def test_features_and_metrics(score: Callable[[], None], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        score()
    path = Path("data/scores/features.parquet")
    features = pl.read_parquet(path)
    assert features.columns == [
        "kind", "hookpoint", "layer", "unit", "language", "probability", "entropy", "members", "monolinguality", "rank",
    ]  # fmt: skip
    assert features.drop("entropy").rows() == [
        ("sae", LOW, 2, 1, "en", 0.6, 1, 0.6, 1),
        ("sae", LOW, 2, 0, "en", 0.5, 1, 1.0 - 0.05 / 2, 2),
        ("sae", HIGH, 11, 0, "de", 0.8, 1, 2.4, 1),
    ]
    metrics = json.loads(Path("metrics/score.json").read_text())
    assert {key: value for key, value in metrics.items() if not key.startswith(("mean_", "effective_"))} == {
        "features": 3, "features/en": 2, "features/de": 1, "features/fi": 0,
        "features_in_layer/2": 2, "features_in_layer/11": 1, "languages_without_features": 1,
            "shared_by/1": 3, "shared_by/2": 0, "shared_by/3": 0,
    }  # fmt: skip
    entropy = features["entropy"].to_list()
    assert {key: value for key, value in metrics.items() if key.startswith("effective_")} == {
        "effective_languages": pytest.approx(math.exp(sum(entropy) / 3)),
        "effective_languages/en": pytest.approx(math.exp(sum(entropy[:2]) / 2)),
        "effective_languages/de": pytest.approx(math.exp(entropy[2])),
        "effective_languages_median": pytest.approx(math.exp(sorted(entropy)[1])),
        "effective_languages_median/en": pytest.approx((math.exp(entropy[0]) + math.exp(entropy[1])) / 2),
        "effective_languages_median/de": pytest.approx(math.exp(entropy[2])),
    }
    table = [line.split() for line in caplog.messages if line.startswith(("language", "en", "all", "fi"))]
    assert table[1][:3] == ["en", "2", f"{metrics['effective_languages/en']:.2f}"]
    assert table[2] == ["fi", "0", "-", "-", "-"]
    assert table[3][:3] == ["all", "3", f"{metrics['effective_languages']:.2f}"]
    assert metrics["mean_probability"] == pytest.approx((0.6 + 0.5 + 0.8) / 3)
    assert "no features: fi" in caplog.text
    before = path.read_bytes(), Path("metrics/score.json").read_bytes()
    score()
    assert (path.read_bytes(), Path("metrics/score.json").read_bytes()) == before


def test_max_entropy_leaves_out_features_and_nothing_else(
    score: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    score()
    path, metrics = Path("data/scores/features.parquet"), Path("metrics/score.json")
    all_features, before = pl.read_parquet(path), json.loads(metrics.read_text())
    similar = Path("data/scores/similarity.parquet").read_bytes()
    limit = all_features["entropy"].sort()[1]
    params = config.load()
    gated = params.model_copy(update={"score": params.score.model_copy(update={"max_entropy": limit})})
    monkeypatch.setattr(config, "load", lambda: gated)
    score()
    kept = pl.read_parquet(path)
    assert len(kept) == 2 and kept.drop("rank").equals(all_features.filter(pl.col("entropy") <= limit).drop("rank"))
    after = json.loads(metrics.read_text())
    assert after["features"] == 2 and after["shared_by/1"] == before["shared_by/1"] == 3
    assert Path("data/scores/similarity.parquet").read_bytes() == similar


def with_neurons(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two hookpoints of 4 neurons each: 24 probabilities, of which 17 are 0."""
    folder = Path("data/neurons")
    folder.mkdir(parents=True)
    low = [(0, "en", 90, 10, 100.0), (1, "en", 60, 9, 60.0), (1, "de", 60, 9, 120.0), (2, "de", 5, 2, 5.0)]
    high = [(3, "de", 80, 10, 240.0), (3, "fi", 10, 3, 20.0), (0, "fi", 2, 1, 2.0)]
    counts(2, *low).write_parquet(folder / f"{LOW}.act_fn.parquet")
    counts(11, *high).write_parquet(folder / f"{HIGH}.act_fn.parquet")
    TOTALS.write_parquet(folder / "totals.parquet")
    (folder / "widths.json").write_text(json.dumps({f"{LOW}.act_fn": 4, f"{HIGH}.act_fn": 4}))
    section = schema.Neurons(hookpoints=[f"{LOW}.act_fn", f"{HIGH}.act_fn"], quantile=0.83, top_rate=0.375)
    params = config.load().model_copy(update={"neurons": section})
    monkeypatch.setattr(config, "load", lambda: params)


def test_neurons_stand_behind_the_features_and_change_none(
    score: Callable[[], None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    score()
    path = Path("data/scores/features.parquet")
    alone, before = pl.read_parquet(path), json.loads(Path("metrics/score.json").read_text())
    with_neurons(monkeypatch)
    with caplog.at_level("INFO"):
        score()
    features = pl.read_parquet(path)
    assert features.filter(kind="sae").equals(alone)
    # The bar is the 20th of 24 values (0.83 * 24 = 19.9): 0.1. The round(0.375 * 8) = 3 neurons of lowest entropy: one
    # of English, one of German and a little Finnish, one of both.
    found = features.filter(kind="neuron")
    assert found.drop("kind", "entropy", "monolinguality").rows() == [
        (f"{LOW}.act_fn", 2, 0, "en", 0.9, 1, 1),
        (f"{LOW}.act_fn", 2, 1, "en", 0.6, 2, 2),
        (f"{HIGH}.act_fn", 11, 3, "de", 0.8, 1, 1),
        (f"{LOW}.act_fn", 2, 1, "de", 0.6, 2, 2),
    ]
    mixed = -(8 / 9 * math.log(8 / 9) + 1 / 9 * math.log(1 / 9))
    assert found["entropy"].to_list() == pytest.approx([0.0, math.log(2), mixed, math.log(2)])
    assert found["monolinguality"].to_list() == pytest.approx([1.0, 0.6 - 1.2 / 2, 2.4 - 0.2 / 2, 1.2 - 0.6 / 2])
    metrics = json.loads(Path("metrics/score.json").read_text())
    assert {key: metrics[key] for key in before} == before
    assert {key: value for key, value in metrics.items() if key not in before and "mean" not in key} == {
        "neurons": 3, "neurons_counted": 8, "neurons/en": 2, "neurons/de": 2, "neurons/fi": 0,
        "neurons_in_layer/2": 2, "neurons_in_layer/11": 1, "languages_without_neurons": 1,
            "neurons_effective_languages/en": pytest.approx(2**0.5),
            "neurons_effective_languages/de": pytest.approx(math.exp((mixed + math.log(2)) / 2)),
            "neurons_effective_languages": pytest.approx(math.exp((2 * math.log(2) + mixed) / 4)),
            "neurons_effective_languages_median/en": pytest.approx((1 + 2) / 2),
            "neurons_effective_languages_median/de": pytest.approx((math.exp(mixed) + 2) / 2),
            "neurons_effective_languages_median": pytest.approx((math.exp(mixed) + 2) / 2),
    }  # fmt: skip
    assert metrics["neurons_mean_probability"] == pytest.approx((0.9 + 0.6 + 0.8 + 0.6) / 4)
    assert "no neurons: fi (a lower neurons.quantile" in caplog.text


def test_no_neuron_at_all_is_a_result(score: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    with_neurons(monkeypatch)
    section = config.load().neurons.model_copy(update={"quantile": 1.0})  # no probability is above the largest
    params = config.load().model_copy(update={"neurons": section})
    monkeypatch.setattr(config, "load", lambda: params)
    score()
    assert set(pl.read_parquet("data/scores/features.parquet")["kind"]) == {"sae"}
    metrics = json.loads(Path("metrics/score.json").read_text())
    assert metrics["neurons"] == 0 and metrics["languages_without_neurons"] == 3
    assert "neurons_mean_entropy" not in metrics


def test_counts_of_neurons_that_are_missing_or_stale_are_named(
    score: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_neurons(monkeypatch)
    totals = Path("data/neurons/totals.parquet")
    TOTALS.with_columns(pl.col("tokens") + 1).write_parquet(totals)
    with pytest.raises(UserError, match=f"data/neurons/totals.parquet: other totals than in .*{LOW}.totals.parquet"):
        score()
    TOTALS.write_parquet(totals)
    Path(f"data/neurons/{HIGH}.act_fn.parquet").unlink()
    with pytest.raises(UserError, match=f"{HIGH}.act_fn.parquet: no such file; an earlier stage writes it: dvc repro"):
        score()


def test_no_feature_at_all_is_a_result(score: Callable[[], None]) -> None:
    for hookpoint, layer in ((LOW, 2), (HIGH, 11)):
        counts(layer, (0, "en", 1, 1, 1.0)).write_parquet(f"data/counts/{hookpoint}.parquet")
    score()
    assert pl.read_parquet("data/scores/features.parquet").is_empty()
    metrics = json.loads(Path("metrics/score.json").read_text())
    assert metrics["languages_without_features"] == 3 and "mean_entropy" not in metrics


def test_stale_and_missing_files_are_named(score: Callable[[], None]) -> None:
    totals = Path(f"data/counts/{HIGH}.totals.parquet")
    TOTALS.with_columns(pl.col("tokens") + 1).write_parquet(totals)
    with pytest.raises(UserError, match=f"{HIGH}.totals.parquet: other totals than in .*{LOW}.totals.parquet"):
        score()
    TOTALS.head(2).write_parquet(totals)
    with pytest.raises(UserError, match=f"{HIGH}.totals.parquet: its languages"):
        score()
    TOTALS.write_parquet(totals)
    Path(f"data/counts/{LOW}.parquet").unlink()
    with pytest.raises(UserError, match=f"{LOW}.parquet: no such file"):
        score()
