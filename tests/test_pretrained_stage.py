"""Stage `train` with `train.source: pretrained`: released SAEs in place of trained ones."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from closure import ROOT
from ruamel.yaml import YAML

from babelscope import config
from babelscope.activations import store
from babelscope.bridges import sparsify
from babelscope.core.errors import UserError
from babelscope.core.paths import Paths
from babelscope.sae import SAE, load
from babelscope.sae.training.run import run as run_stage

HOOKPOINT = "layers.2.mlp"
D, N = 16, 64


def released() -> SAE:
    draw = torch.Generator().manual_seed(0)
    return SAE(torch.randn(N, D, generator=draw), torch.randn(N, D, generator=draw), torch.zeros(N), torch.zeros(D), 4)


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, float]]:
    """Made-up activations, and the stage to be run on them with these params beside the shipped ones."""
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "data/activations" / HOOKPOINT
    store.write_shard(place, 0, torch.randn(300, D, generator=torch.Generator().manual_seed(1)).half())
    store.write_index(place, [300], D, "float16", "made-up", HOOKPOINT)
    splits = {"row": range(300), "language": ["en", "tr"] * 150, "split": ["train"] * 200 + ["eval"] * 100}
    pl.DataFrame(splits).write_parquet(tmp_path / "data/activations/tokens.parquet")

    def run(transcode: bool = False, **pretrained: Any) -> dict[str, float]:
        content = YAML(typ="safe", pure=True).load((ROOT / "params.yaml").read_text())
        content |= {"languages": ["en", "tr"], "hookpoints": [HOOKPOINT]}
        content["train"] |= {"source": "pretrained", "transcode": transcode}
        content["stability"]["hookpoints"] = []
        content["steer"] |= {"hookpoints": [], "prompt_languages": ["en"]}
        content["ablate"]["methods"] = ["directional"]
        content["pretrained"] |= pretrained
        content["hardware"]["accelerator"] = "cpu"
        run_stage(config.parse(content), Paths(), HOOKPOINT)
        found: dict[str, float] = json.loads((tmp_path / f"metrics/train.{HOOKPOINT}.json").read_text())
        return found

    return run


def test_a_released_sae_stands_where_a_trained_one_would(train: Callable[..., dict[str, float]]) -> None:
    sparsify.write(released(), Path("released") / HOOKPOINT)
    out = Path("data/sae") / HOOKPOINT
    out.mkdir(parents=True)
    (out / "history.csv").write_text("of another training")
    figures = train(name="released")
    ours, x = load("data/sae", HOOKPOINT), torch.randn(5, D)
    torch.testing.assert_close(ours(x), released()(x), rtol=0, atol=0)
    assert {path.name for path in out.iterdir()} == {"cfg.json", "sae_weights.safetensors"}
    assert figures["l0"] == 4 and figures["layer"] == 2 and "tokens" not in figures
    held_out = store.ActivationStore(Path("data/activations") / HOOKPOINT).gather(torch.arange(200, 300)).float()
    error = (released()(held_out) - held_out).square().sum() / (held_out - held_out.mean(0)).square().sum()
    assert figures["fvu"] == pytest.approx(float(error.detach()), rel=1e-4) and "fvu/tr" in figures
    assert json.loads((out / "cfg.json").read_text())["metadata"]["released_as"] == f"released/{HOOKPOINT}"


def test_the_folder_is_filled_in_or_named_for_each_hookpoint(train: Callable[..., dict[str, float]]) -> None:
    place = Path("scope/layer_2/width_64")
    place.mkdir(parents=True)
    W, zero = released().encoder.detach().numpy(), np.zeros(N, np.float32)
    np.savez(place / "params.npz", W_enc=W.T, W_dec=W, b_enc=zero, b_dec=np.zeros(D, np.float32), threshold=zero)
    by_pattern = train(name="scope", folder="layer_{layer}/width_64")
    assert by_pattern == train(name="scope", folder={HOOKPOINT: "layer_2/width_64"})


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"name": "nowhere/to/be/found"}, "nowhere/to/be/found: no such folder"),
        ({"name": "released", "folder": "layer_{layer}"}, "released/layer_2 or released: no SAE here"),
        ({"name": None}, r"pretrained\.name: train\.source 'pretrained' needs a local folder or a hub id"),
        ({"name": "released", "folder": "{k}"}, r"pretrained\.folder.*: {k} is unknown; allowed: {hookpoint}, {layer}"),
        ({"name": "released", "folder": {"layers.3.mlp": "x"}}, r"pretrained\.folder: no folder for 'layers\.2\.mlp'"),
        ({"name": "released", "folder": 3}, r"pretrained\.folder.*: .*got 3"),
    ],
)
def test_what_is_not_there_is_named(
    train: Callable[..., dict[str, float]], params: dict[str, Any], message: str
) -> None:
    sparsify.write(released(), Path("released") / HOOKPOINT)
    with pytest.raises(UserError, match=message):
        train(**params)


def test_a_release_for_another_model_or_of_another_kind_is_refused(train: Callable[..., dict[str, float]]) -> None:
    wide = SAE(torch.randn(N, 24), torch.randn(N, 24), torch.zeros(N), torch.zeros(24), 4)
    sparsify.write(wide, Path("wide") / HOOKPOINT)
    with pytest.raises(UserError, match=r"takes 24 dimensions and gives 24; layers\.2\.mlp has 16 and 16"):
        train(name="wide")
    sae = released()
    sparsify.write(SAE(sae.encoder, sae.W_dec, sae.b_enc, sae.b_dec, 4, b_in=torch.zeros(D)), Path("t") / HOOKPOINT)
    with pytest.raises(UserError, match=r"train\.transcode: False, but .* holds a transcoder; allowed: True"):
        train(name="t")
