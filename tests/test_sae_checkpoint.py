import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from babelscope import sae as public
from babelscope.core.errors import UserError
from babelscope.sae.autoencoder import SAE, initialise
from babelscope.sae.checkpoint import load, save

META = {"model_name": "made-up", "hook_name": "layers.1.mlp"}
KINDS = ("topk", "jumprelu", "standard", "topk_transcoder", "jumprelu_transcoder", "transcoder")


def example() -> SAE:
    generator = torch.Generator().manual_seed(0)
    sae = initialise(torch.randn(16, generator=generator), 64, 4, encoder_scale=0.5, seed=0)
    with torch.no_grad():
        sae.b_enc.normal_(0.0, 0.1, generator=generator)
    return sae


def kind_of(architecture: str, d: int = 16, d_in: int = 16) -> SAE:
    """An SAE with 64 latents of each kind; transcoders have a `b_in`."""
    generator = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    weights = (draw(64, d_in), draw(64, d), draw(64), draw(d))
    b_in = draw(d_in) if architecture.endswith("transcoder") else None
    if architecture.startswith("topk"):
        return SAE(*weights, 4, b_in=b_in)
    threshold = draw(64).abs() if architecture.startswith("jumprelu") else torch.zeros(64)
    return SAE(*weights, threshold=threshold, b_in=b_in)


def x_of(d: int = 16) -> torch.Tensor:
    return torch.randn(30, d, generator=torch.Generator().manual_seed(1))


def dense(sae: SAE, x: torch.Tensor) -> torch.Tensor:
    """Activations [rows, n]."""
    values, indices = sae.encode(x)
    return torch.zeros(len(x), sae.latents).scatter_add(1, indices, values)


def config_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "cfg.json").read_text()))


def edit(folder: Path, **changes: Any) -> None:
    (folder / "cfg.json").write_text(json.dumps(config_of(folder) | changes))


def test_round_trip_in_the_layout_of_saelens(tmp_path: Path) -> None:
    sae = example()
    save(sae, tmp_path / "layers.1.mlp", META)
    tensors = load_file(tmp_path / "layers.1.mlp" / "sae_weights.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert shapes == {"W_enc": (16, 64), "b_enc": (64,), "W_dec": (64, 16), "b_dec": (16,)}
    config = config_of(tmp_path / "layers.1.mlp")
    assert (config["architecture"], config["d_in"], config["d_sae"], config["k"]) == ("topk", 16, 64, 4)
    assert config["metadata"] == {"sae_lens_version": "6.0.0"} | META
    for found in (public.load(tmp_path, "layers.1.mlp"), load(str(tmp_path / "layers.1.mlp"))):
        assert found.k == 4
        for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
            assert torch.equal(getattr(found, name), getattr(sae, name))


@pytest.mark.parametrize("architecture", KINDS)
def test_the_same_weights_give_the_same_bytes(tmp_path: Path, architecture: str) -> None:
    for name in ("a", "b"):
        save(kind_of(architecture), tmp_path / name, META)
    save(load(tmp_path / "a"), tmp_path / "again", META)
    for file in ("cfg.json", "sae_weights.safetensors"):
        for other in ("b", "again"):
            assert (tmp_path / "a" / file).read_bytes() == (tmp_path / other / file).read_bytes()
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["cfg.json", "sae_weights.safetensors"]


@pytest.mark.parametrize("architecture", ["topk", "jumprelu", "standard"])
def test_every_autoencoder_comes_back_as_it_was(tmp_path: Path, architecture: str) -> None:
    sae = kind_of(architecture)
    save(sae, tmp_path, META)
    config, found = config_of(tmp_path), load(tmp_path)
    assert (config["architecture"], config["apply_b_dec_to_input"]) == (architecture, True)
    assert "d_out" not in config
    assert ("threshold" in load_file(tmp_path / "sae_weights.safetensors")) == (architecture == "jumprelu")
    assert found.k == sae.k
    assert found.b_in is None
    states = sae.state_dict(), found.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("d_in", [16, 24])
@pytest.mark.parametrize("architecture", ["topk_transcoder", "jumprelu_transcoder", "transcoder"])
def test_the_input_bias_of_a_transcoder_is_folded_into_its_encoder(
    tmp_path: Path, architecture: str, d_in: int
) -> None:
    sae = kind_of(architecture, d_in=d_in)
    save(sae, tmp_path, META)
    config, found = config_of(tmp_path), load(tmp_path)
    # SAELens has no TopK transcoder, but its TopK autoencoder computes one whose widths agree.
    assert config["architecture"] == ("topk" if (architecture, d_in) == ("topk_transcoder", 16) else architecture)
    assert (config["d_in"], config["d_out"], config["apply_b_dec_to_input"]) == (d_in, 16, False)
    assert sae.b_in is not None and found.b_in is not None
    assert torch.equal(found.b_in, torch.zeros(d_in))
    folded = sae.b_enc.double() - sae.encoder.double() @ sae.b_in.double()
    assert torch.equal(found.b_enc, folded.float())
    for name in ("encoder", "W_dec", "b_dec"):
        assert torch.equal(getattr(found, name), getattr(sae, name))
    torch.testing.assert_close(dense(found, x_of(d_in)), dense(sae, x_of(d_in)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found(x_of(d_in)), sae(x_of(d_in)), rtol=1e-4, atol=1e-4)


def test_one_latent_by_hand(tmp_path: Path) -> None:
    """z = 3 (x - 2) + 1 above 5, y = 10 z + 7: at x = 3.2, 3.4 the scores are 4.6 and 5.2."""
    one = [torch.tensor(value) for value in ([[3.0]], [[10.0]], [1.0], [7.0])]
    save(SAE(*one, threshold=torch.tensor([5.0]), b_in=torch.tensor([2.0])), tmp_path, META)
    assert load_file(tmp_path / "sae_weights.safetensors")["b_enc"].tolist() == [-5.0]
    torch.testing.assert_close(load(tmp_path)(torch.tensor([[3.2], [3.4]])), torch.tensor([[7.0], [59.0]]))


def test_a_negative_threshold_lets_no_negative_score_through(tmp_path: Path) -> None:
    sae = kind_of("jumprelu")
    save(sae, tmp_path, META)
    tensors = load_file(tmp_path / "sae_weights.safetensors")
    tensors["threshold"] -= 1.0
    save_file(tensors, tmp_path / "sae_weights.safetensors")
    scores = (x_of() - sae.b_dec) @ sae.W_enc + sae.b_enc
    expected = scores.relu() * (scores > tensors["threshold"])
    assert bool((tensors["threshold"] < 0).any())
    torch.testing.assert_close(dense(load(tmp_path), x_of()), expected, rtol=1e-5, atol=1e-5)


def test_what_older_files_of_saelens_leave_out(tmp_path: Path) -> None:
    save(kind_of("standard"), tmp_path, META)
    edit(tmp_path, architecture=None, activation_fn_str="relu")
    torch.testing.assert_close(load(tmp_path)(x_of()), kind_of("standard")(x_of()))
    edit(tmp_path, activation_fn_str="topk")
    with pytest.raises(UserError, match="activation_fn_str is 'topk'; allowed: 'relu'"):
        load(tmp_path)


def write_sparsify(folder: Path, sae: SAE, **changes: Any) -> None:
    folder.mkdir()
    weights = {"encoder.weight": sae.encoder, "encoder.bias": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    save_file({name: weight.detach().clone() for name, weight in weights.items()}, folder / "sae.safetensors")
    config = {"activation": "topk", "expansion_factor": 4, "k": 4, "d_in": 16, "num_latents": 0, "transcode": False}
    (folder / "cfg.json").write_text(json.dumps(config | {"skip_connection": False, "multi_topk": False} | changes))


def test_sparsify_checkpoints_mean_the_same(tmp_path: Path) -> None:
    sae = example()
    write_sparsify(tmp_path / "layers.1.mlp", sae)
    found = load(tmp_path, "layers.1.mlp")
    torch.testing.assert_close(found(x_of()), sae(x_of()))
    assert found.b_in is None


def test_transcoders_of_sparsify_encode_their_input_as_it_is(tmp_path: Path) -> None:
    sae = example()
    write_sparsify(tmp_path / "layers.1.mlp", sae, transcode=True)
    found = load(tmp_path, "layers.1.mlp")
    values, indices = (x_of() @ sae.W_enc + sae.b_enc).relu().topk(4)
    expected = torch.zeros(30, 64).scatter(1, indices, values)
    torch.testing.assert_close(dense(found, x_of()), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found(x_of()), expected @ sae.W_dec + sae.b_dec, rtol=1e-5, atol=1e-5)
    assert found.b_in is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"skip_connection": True}, "skip_connection is true without W_skip in the weights"),
        ({"activation": "groupmax"}, "activation is 'groupmax'; allowed: 'topk'"),
        ({"signed": True}, "signed is True; allowed: False"),
        ({"transcode": "no"}, "transcode is 'no'; allowed: False, True"),
        ({"k": "4"}, "k is '4'; allowed: a whole number"),
    ],
)
def test_what_sparsify_does_and_we_do_not_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_sparsify(tmp_path / "layers.1.mlp", example(), **changes)
    with pytest.raises(UserError, match=f"layers.1.mlp/cfg.json: {message}"):
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


def test_a_decoder_row_of_norm_0_never_fires(tmp_path: Path) -> None:
    sae = kind_of("topk")
    with torch.no_grad():
        sae.W_dec[5] = 0.0
    save(sae, tmp_path, META)
    edit(tmp_path, rescale_acts_by_decoder_norm=True)
    found = load(tmp_path)
    assert bool(found(x_of()).isfinite().all())
    assert float(dense(found, x_of())[:, 5].max()) == 0.0


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
        (lambda f: edit(f, architecture="gated"), "architecture is 'gated'; allowed: 'standard', 'topk', 'jumprelu'"),
        (lambda f: edit(f, architecture="topk_skip_transcoder", apply_b_dec_to_input=False), "key 'W_skip'"),
        (lambda f: edit(f, architecture="jumprelu"), "key 'threshold'"),
        (lambda f: edit(f, architecture="transcoder"), "apply_b_dec_to_input is True; allowed: False"),
        (lambda f: edit(f, apply_b_dec_to_input="no"), "apply_b_dec_to_input is 'no'; allowed: True, False"),
        (lambda f: edit(f, normalize_activations="layer_norm"), "normalize_activations is 'layer_norm'"),
        (lambda f: edit(f, finetuning_scaling_factor=True), "finetuning_scaling_factor is True"),
        (lambda f: edit(f, k=65), "k = 65"),
        (lambda f: edit(f, k=True), "k is True; allowed: a whole number"),
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
    with pytest.raises(UserError, match="owner/name: .*hub does not give it: offline"):
        load("owner/name", "layers.1.mlp")
