"""The firings in delphi's cache format, read back as delphi's loader reads them."""

import json
import re
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.numpy import load_file
from test_browse_stage import folder  # noqa: F401
from test_neurons_stages import SAE_AT, model  # noqa: F401

from babelscope import config, sae
from babelscope.activations.store import ActivationStore
from babelscope.bridges import delphi
from babelscope.core.errors import UserError
from babelscope.sae.autoencoder import SAE


def firings(folder: Path) -> tuple[dict[tuple[int, int, int], float], np.ndarray]:  # noqa: F811
    """(context, position, latent) -> activation, and the tokens: what delphi's TensorBuffer makes of the files."""
    found, tokens = {}, np.empty(0)
    for path in sorted(folder.glob("*.safetensors")):
        first = int(path.name.split("_")[0])
        split = load_file(path)
        locations = split["locations"].astype(np.int64)
        locations[:, 2] += first
        assert locations[:, 2].max(initial=0) <= int(path.stem.split("_")[1])
        tokens = split["tokens"]
        found |= dict(zip(map(tuple, locations.tolist()), split["activations"].tolist(), strict=True))
    return found, tokens


class WithPad:
    pad_token_id, eos_token_id = None, 59


@pytest.fixture(autouse=True)
def tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delphi.loading, "load_tokenizer", lambda section: WithPad())


def test_every_hookpoint_of_params_is_written(
    folder: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    params = config.load()
    model = params.model.model_copy(update={"name": "/some/where/models/tiny"})  # noqa: F811
    monkeypatch.setattr(config, "load", lambda: params.model_copy(update={"model": model}))
    delphi.main(tmp_path, [])
    settings = json.loads((tmp_path / SAE_AT / "config.json").read_text())
    assert settings["model_name"] == "tiny"  # as on every other machine
    assert {path.name for path in tmp_path.iterdir()} == set(config.load().hookpoints)


def test_the_cache_holds_every_firing_at_its_token(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    delphi.main(tmp_path, [SAE_AT])
    found, tokens = firings(tmp_path / SAE_AT)
    assert {path.name for path in tmp_path.iterdir()} == {SAE_AT}
    table = pl.read_parquet("data/activations/tokens.parquet").filter(split="train")
    dictionary, store = sae.load("data/sae", SAE_AT), ActivationStore(Path("data/activations") / SAE_AT)
    expected = {}
    for context, (_, text) in enumerate(table.group_by("text_id", maintain_order=True)):
        values, indices = dictionary.encode(store.gather(text["row"].to_torch()))
        for position, latent in (values > 0).nonzero().tolist():
            expected[context, position, int(indices[position, latent])] = float(values[position, latent].half())
        assert tokens[context, : len(text)].tolist() == text["token_id"].to_list()
        assert (tokens[context, len(text) :] == 59).all()
    assert found == expected and len(expected) > 100
    settings = json.loads((tmp_path / SAE_AT / "config.json").read_text())
    assert settings["ctx_len"] == tokens.shape[1]


def test_ranges_cover_all_latents_and_large_numbers_keep_their_bits(tmp_path: Path) -> None:
    locations = np.array([[0, 1, 0], [70000, 2, 8], [3, 0, 9]])
    delphi.write_cache(tmp_path, 10, np.zeros((1, 3), np.uint32), locations, np.array([1, 2, 3], np.float16))
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["0_1", "2_3", "4_5", "6_7", "8_9"]
    found, _ = firings(tmp_path)
    assert found == {(0, 1, 0): 1.0, (70000, 2, 8): 2.0, (3, 0, 9): 3.0}


def test_fewer_latents_than_files_give_a_file_each(tmp_path: Path) -> None:
    locations = np.array([[0, 1, 0], [1, 2, 2]])
    delphi.write_cache(tmp_path, 3, np.zeros((2, 3), np.uint32), locations, np.array([1, 2], np.float16))
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["0_0", "1_1", "2_2"]
    assert firings(tmp_path)[0] == {(0, 1, 0): 1.0, (1, 2, 2): 2.0}


def test_activations_too_large_for_float16_are_written_as_its_largest_and_told(
    folder: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    encode = SAE.encode

    def large(self: SAE, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values, indices = encode(self, x)
        return values * 1e9, indices

    monkeypatch.setattr(SAE, "encode", large)
    delphi.main(tmp_path, [SAE_AT])
    assert set(firings(tmp_path / SAE_AT)[0].values()) == {65504.0}
    assert re.search(rf"{SAE_AT}: \d+ activations above 65504", caplog.text)


def test_wrong_hookpoints_are_named(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    with pytest.raises(UserError, match=r"hookpoints: no 'layers\.9\.mlp'; allowed: "):
        delphi.main(tmp_path, ["layers.9.mlp"])
