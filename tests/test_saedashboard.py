"""The features of the browser as SAEDashboard's batches, which its own classes hold unchanged."""

import json
from pathlib import Path

import polars as pl
import pytest
from peers import in_its_environment
from test_browse_stage import WIDE, folder  # noqa: F401
from test_neurons_stages import SAE_AT, model  # noqa: F401

from babelscope import cli
from babelscope.bridges import saedashboard
from babelscope.core.errors import UserError


def test_every_feature_is_written_with_its_texts_tokens_and_histogram(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    cli.main(["export", str(tmp_path), "--format", "saedashboard"])
    assert {path.name for path in tmp_path.iterdir()} == {SAE_AT, WIDE}
    content = json.loads((tmp_path / SAE_AT / "batch-0.json").read_text())
    table = {name: pl.read_parquet(f"data/browse/{name}.parquet").filter(hookpoint=SAE_AT)
             for name in ("features", "examples", "histograms", "tokens")}  # fmt: skip
    texts = dict(pl.read_parquet("data/browse/texts.parquet").select("text_id", "pieces").iter_rows())
    assert (content["layer"], content["sae_set"]) == (1, SAE_AT)
    assert [one["feature_index"] for one in content["features"]] == table["features"]["unit"].to_list()
    counts = pl.read_parquet(f"data/counts/{SAE_AT}.parquet").group_by("unit").agg(pl.col("tokens").sum())
    every = pl.read_parquet(f"data/counts/{SAE_AT}.totals.parquet")["tokens"].sum()
    firing = dict(counts.iter_rows())
    banded = 0
    for one in content["features"]:
        unit = one["feature_index"]
        assert one["frac_nonzero"] == pytest.approx(firing[unit] / every)
        histogram = table["histograms"].filter(unit=unit)
        assert one["freq_hist_data_bar_heights"] == (histogram["own"] + histogram["other"]).to_list()
        bars, largest = one["freq_hist_data_bar_values"], table["features"].filter(unit=unit)["largest"].item()
        assert bars[0] == pytest.approx(largest / 48, abs=1e-3) and len(bars) == 24
        promoted = table["tokens"].filter(unit=unit, side="promoted").sort("place")
        assert (one["pos_str"], one["pos_values"]) == (promoted["token"].to_list(), promoted["logit"].to_list())
        examples = table["examples"].filter(unit=unit)
        assert len(one["activations"]) == len(examples)
        for shown, row in zip(one["activations"], examples.iter_rows(named=True), strict=True):
            assert (shown["tokens"], shown["values"]) == (texts[row["text_id"]], row["activations"])
            assert shown["values"][shown["qualifying_token_index"]] == max(shown["values"])
            if row["side"] == "sample":
                banded += 1
                assert shown["bin_min"] - 1e-3 <= max(shown["values"]) <= shown["bin_max"] + 1e-3
                assert 0 <= shown["bin_contains"] <= 1
            else:
                assert (shown["bin_min"], shown["bin_contains"]) == (-1, -1)
    assert banded > 3


def test_the_share_of_a_band_is_of_the_firings() -> None:
    # 24 bins up to 12, four firings in the lowest quarter (0 to 3), one in the third (6 to 9).
    histogram = pl.DataFrame({"low": [i / 2 for i in range(24)], "high": [(i + 1) / 2 for i in range(24)],
                              "count": [1, 1, 0, 0, 0, 2, *[0] * 11, 1, *[0] * 6]})  # fmt: skip
    assert saedashboard._interval(2.9, 12.0, histogram) == {"bin_min": 0, "bin_max": 3, "bin_contains": 0.8}
    assert saedashboard._interval(6.0, 12.0, histogram) == {"bin_min": 6, "bin_max": 9, "bin_contains": 0.2}


def test_one_hookpoint_or_none(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    saedashboard.main(tmp_path, [WIDE])
    [path] = tmp_path.glob("*/batch-0.json")
    assert path.parent.name == WIDE and json.loads(path.read_text())["features"][0]["pos_str"] == []
    with pytest.raises(UserError, match=r"layers\.9\.mlp: the feature browser has no features of it; allowed"):
        saedashboard.main(tmp_path, ["layers.9.mlp"])


DASHBOARD_SIDE = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from sae_dashboard.neuronpedia.neuronpedia_dashboard import NeuronpediaDashboardBatch

folder, activations = Path(sys.argv[1]), []
for path in sorted(folder.glob("*/batch-0.json")):
    content = json.loads(path.read_text())
    batch = NeuronpediaDashboardBatch(**content)
    (path.parent / "again.json").write_text(json.dumps(batch.to_dict()))
save_file({"ok": torch.ones(1)}, folder / "results.safetensors")
"""


def test_saedashboard_holds_it_unchanged(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    saedashboard.main(tmp_path, [])
    in_its_environment("sae-dashboard", DASHBOARD_SIDE, tmp_path, None)
    for path in tmp_path.glob("*/batch-0.json"):
        ours, again = (json.loads((path.parent / name).read_text()) for name in ("batch-0.json", "again.json"))
        assert ours | {"features": None} == again | {"features": None}
        for mine, theirs in zip(ours["features"], again["features"], strict=True):
            assert mine == {key: theirs[key] for key in mine}
            assert all(theirs[key] in ([], 0) for key in theirs.keys() - mine.keys())
