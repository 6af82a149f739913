"""The stage `score`, run on two small hookpoints."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import polars as pl
import pytest

from babelscope import config
from babelscope.errors import UserError

ROOT = Path(__file__).parent.parent
LOW, HIGH = "layers.2.mlp", "layers.11.mlp"
TOTALS = pl.DataFrame({"language": ["fi", "de", "en"], "tokens": [100, 100, 100], "texts": [10, 10, 10]})


def counts(layer: int, *rows: tuple[int, str, int, int, float]) -> pl.DataFrame:
    frame = pl.DataFrame(rows, schema=["unit", "language", "tokens", "texts", "sum"], orient="row")
    return frame.select(
        pl.lit(layer, pl.Int32).alias("layer"), pl.col("unit").cast(pl.Int32), pl.exclude("unit")
    ).with_columns(max=pl.lit(1.0, pl.Float32), min_positive=pl.lit(0.5, pl.Float32))


@pytest.fixture
def score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
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
    params = shipped.model_copy(update={"languages": ["en", "de", "fi"], "hookpoints": [LOW, HIGH]})
    monkeypatch.setattr(config, "load", lambda: params)
    spec = importlib.util.spec_from_file_location("stage_score", ROOT / "stages" / "score.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_features_and_metrics(score: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        score.main()
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
    assert {key: value for key, value in metrics.items() if not key.startswith("mean_")} == {
        "features": 3, "features/en": 2, "features/de": 1, "features/fi": 0,
        "features_in_layer/2": 2, "features_in_layer/11": 1, "languages_without_features": 1,
    }  # fmt: skip
    assert metrics["mean_probability"] == pytest.approx((0.6 + 0.5 + 0.8) / 3)
    assert "no features: fi" in caplog.text
    before = path.read_bytes(), Path("metrics/score.json").read_bytes()
    score.main()
    assert (path.read_bytes(), Path("metrics/score.json").read_bytes()) == before


def test_no_feature_at_all_is_a_result(score: ModuleType) -> None:
    for hookpoint, layer in ((LOW, 2), (HIGH, 11)):
        counts(layer, (0, "en", 1, 1, 1.0)).write_parquet(f"data/counts/{hookpoint}.parquet")
    score.main()
    assert pl.read_parquet("data/scores/features.parquet").is_empty()
    metrics = json.loads(Path("metrics/score.json").read_text())
    assert metrics["languages_without_features"] == 3 and "mean_entropy" not in metrics


def test_stale_and_missing_files_are_named(score: ModuleType) -> None:
    totals = Path(f"data/counts/{HIGH}.totals.parquet")
    TOTALS.with_columns(pl.col("tokens") + 1).write_parquet(totals)
    with pytest.raises(UserError, match=f"{HIGH}.totals.parquet: other totals than in .*{LOW}.totals.parquet"):
        score.main()
    TOTALS.head(2).write_parquet(totals)
    with pytest.raises(UserError, match=f"{HIGH}.totals.parquet: its languages"):
        score.main()
    TOTALS.write_parquet(totals)
    Path(f"data/counts/{LOW}.parquet").unlink()
    with pytest.raises(UserError, match=f"{LOW}.parquet: no such file"):
        score.main()
