import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from babelscope import sae as public
from babelscope.errors import UserError
from babelscope.sae.autoencoder import SAE, initialise
from babelscope.sae.checkpoint import load, save

META = {"model_name": "made-up", "hook_name": "layers.1.mlp"}


def example() -> SAE:
    generator = torch.Generator().manual_seed(0)
    sae = initialise(torch.randn(16, generator=generator), 64, 4, encoder_scale=0.5, seed=0)
    with torch.no_grad():
        sae.b_enc.normal_(0.0, 0.1, generator=generator)
    return sae


def x_of() -> torch.Tensor:
    return torch.randn(30, 16, generator=torch.Generator().manual_seed(1))


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps(config | changes))


def test_round_trip_in_the_layout_of_saelens(tmp_path: Path) -> None:
    sae = example()
    save(sae, tmp_path / "layers.1.mlp", META)
    tensors = load_file(tmp_path / "layers.1.mlp" / "sae_weights.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert shapes == {"W_enc": (16, 64), "b_enc": (64,), "W_dec": (64, 16), "b_dec": (16,)}
    config = json.loads((tmp_path / "layers.1.mlp" / "cfg.json").read_text())
    assert (config["architecture"], config["d_in"], config["d_sae"], config["k"]) == ("topk", 16, 64, 4)
    assert config["metadata"] == META
    for found in (public.load(tmp_path, "layers.1.mlp"), load(str(tmp_path / "layers.1.mlp"))):
        assert found.k == 4
        for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
            assert torch.equal(getattr(found, name), getattr(sae, name))


def test_the_same_weights_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save(example(), tmp_path / name, META)
    for file in ("cfg.json", "sae_weights.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["cfg.json", "sae_weights.safetensors"]


def test_sparsify_checkpoints_mean_the_same(tmp_path: Path) -> None:
    sae = example()
    folder = tmp_path / "layers.1.mlp"
    folder.mkdir()
    weights = {"encoder.weight": sae.encoder, "encoder.bias": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    save_file({name: weight.detach().clone() for name, weight in weights.items()}, folder / "sae.safetensors")
    config = {"activation": "topk", "expansion_factor": 4, "k": 4, "d_in": 16, "num_latents": 0, "transcode": False}
    (folder / "cfg.json").write_text(json.dumps(config | {"skip_connection": False, "multi_topk": False}))
    torch.testing.assert_close(load(tmp_path, "layers.1.mlp")(x_of()), sae(x_of()))
    edit(folder, skip_connection=True)
    with pytest.raises(UserError, match="skip_connection"):
        load(tmp_path, "layers.1.mlp")


def test_an_encoder_without_input_bias_is_converted(tmp_path: Path) -> None:
    sae = example()
    save(sae, tmp_path, META)
    edit(tmp_path, apply_b_dec_to_input=False)
    scores = (x_of() @ sae.W_enc + sae.b_enc).relu()
    values, _ = load(tmp_path).encode(x_of())
    torch.testing.assert_close(values.sort(descending=True).values, scores.topk(4).values, rtol=1e-5, atol=1e-5)


def test_activations_ranked_by_decoder_norm_are_converted(tmp_path: Path) -> None:
    sae = example()
    with torch.no_grad():
        sae.W_dec.mul_(torch.linspace(0.2, 3.0, 64)[:, None])
    save(sae, tmp_path, META)
    edit(tmp_path, rescale_acts_by_decoder_norm=True)
    norms = sae.W_dec.norm(dim=1)
    scores = ((x_of() - sae.b_dec) @ sae.W_enc + sae.b_enc).relu() * norms
    values, indices = scores.topk(4)
    expected = torch.zeros_like(scores).scatter(1, indices, values) / norms @ sae.W_dec + sae.b_dec
    torch.testing.assert_close(load(tmp_path)(x_of()), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda f: (f / "cfg.json").unlink(), "cfg.json: no such file"),
        (lambda f: (f / "cfg.json").write_text("{"), "cfg.json: not valid JSON"),
        (lambda f: (f / "cfg.json").write_text("[1]"), "cfg.json: expected a JSON object"),
        (
            lambda f: (f / "sae_weights.safetensors").write_bytes(b"\x08" * 20),
            "sae_weights.safetensors: not a readable",
        ),
        (lambda f: (f / "sae_weights.safetensors").unlink(), "no SAE here"),
        (lambda f: save_file({"W_enc": torch.zeros(2, 2)}, f / "sae_weights.safetensors"), "key 'W_dec'"),
        (lambda f: edit(f, architecture="jumprelu"), "architecture is 'jumprelu'; allowed: 'topk'"),
        (lambda f: edit(f, normalize_activations="layer_norm"), "normalize_activations"),
        (lambda f: edit(f, k=65), "k = 65"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, harm: Any, message: str) -> None:
    save(example(), tmp_path, META)
    harm(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        load(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_missing_folder_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for path in ("data/sae", "./sae", str(tmp_path / "sae"), "sae"):
        with pytest.raises(UserError, match="no such folder$"):
            load(path, "layers.1.mlp")


def test_a_hub_id_is_downloaded_by_hookpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    save(example(), tmp_path / "layers.1.mlp", META)
    asked: dict[str, Any] = {}

    def download(repo: str, **options: Any) -> str:
        asked.update(options, repo=repo)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert load("owner/name", "layers.1.mlp", revision="abc").k == 4
    assert asked["repo"] == "owner/name"
    assert asked["revision"] == "abc"
    assert "layers.1.mlp/sae.safetensors" in asked["allow_patterns"]

    def fail(repo: str, **options: Any) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match="owner/name: .*hub: offline"):
        load("owner/name", "layers.1.mlp")
