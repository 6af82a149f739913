"""Releases of others, written by their own packages or in their layout and read by SAELens, in ours."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peers import assert_alike, in_its_environment
from release_files import (
    D,
    N,
    by_saelens_names,
    weights,
    write_dictionary,
    write_gemma_scope,
    write_gemma_scope_2,
    write_linear,
    write_llama_scope,
    write_qwen_scope,
    write_saelens,
    write_sparsify,
    write_traced,
)  # fmt: skip
from safetensors.torch import load_file, save_file

from babelscope.core.errors import UserError
from babelscope.sae import SAE
from babelscope.sae.checkpoint import load, save

# SAELens' loader, the repository, and the folder or file in it.
LAYOUTS = {
    "gemma-scope": ("gemma_2", "x/gemma-scope-2b-pt-res", "layer_3/width_16k/average_l0_9"),
    "gemma-scope-transcoder": (
        "gemma_2_transcoder",
        "x/gemma-scope-2b-pt-transcoders",
        "layer_3/width_16k/average_l0_7",
    ),
    "llama-scope": ("llama_scope", "x/Llama3_1-8B-Base", "Llama3_1-8B-Base-L3R-8x"),
    "gemma-scope-2": ("gemma_3", "x/gemma-scope-2-270m-pt", "resid_post_all/layer_3_width_16k_l0_small"),
    "gemma-scope-2-attention": ("gemma_3", "x/gemma-scope-2-270m-pt", "attn_out/layer_3_width_16k_l0_small"),
    "gemma-scope-2-transcoder": ("gemma_3", "x/gemma-scope-2-270m-pt", "transcoder/layer_3_width_16k_l0_small"),
    "gemma-scope-2-skip": ("gemma_3", "x/gemma-scope-2-270m-pt", "transcoder_all/layer_3_width_16k_l0_small_affine"),
    "qwen-scope": ("qwen_scope", "x/SAE-Res-Qwen3-1.7B-Base-W32K-L0_5", "layer3.sae.pt"),
    "goodfire": ("goodfire", "Goodfire/Llama-3.1-8B-Instruct-SAE-l19", "Llama-3.1-8B-Instruct-SAE-l19.pth"),
    "qresearch": ("deepseek_r1", "x/DeepSeek-R1-Distill-Llama-8B-SAE-l19", "DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt"),
    "mwhanna": ("mwhanna_transcoder", "mwhanna/qwen3-4b-transcoders", "layer_3.safetensors"),
}
# circuit-tracer's loader, and the file's tensors besides the four of every transcoder.
TRACED = {"relu": [], "skip": ["W_skip"], "jumprelu": ["activation_function.threshold"]}
DICTIONARIES = {
    "relu": ("dictionary", "AutoEncoder", {}),
    "topk": ("trainers.top_k", "AutoEncoderTopK", {"k": 4}),
    "batchtopk": ("trainers.batch_top_k", "BatchTopKSAE", {"k": 4}),
    "jumprelu": ("dictionary", "JumpReluAutoEncoder", {}),
    "matryoshka": ("trainers.matryoshka_batch_top_k", "MatryoshkaBatchTopKSAE", {"k": 4, "group_sizes": [16, 48]}),
}

# Its loaders for these layouts fetch from the hub: they are given the folder. The fold is what `from_pretrained` does.
SAELENS_SIDE = """
import json, sys
from pathlib import Path
import sae_lens, torch
from huggingface_hub.utils import EntryNotFoundError
from sae_lens.loading import pretrained_sae_loaders as loaders
from safetensors.torch import load_file, save_file

folder, layouts = Path(sys.argv[1]), json.loads(sys.argv[2])
def local(repo_id, filename, subfolder="", **_):
    path = folder / "theirs" / repo_id / subfolder / filename
    if not path.exists():
        raise EntryNotFoundError(str(path))
    return str(path)
loaders.hf_hub_download = local
loaders.get_safetensors_tensor_shapes = lambda repo, name: {
    key: list(value.shape) for key, value in load_file(local(repo, name)).items()}
results = {}
for name, (loader, repo, place) in layouts.items():
    module, sizes = loaders.NAMED_PRETRAINED_SAE_LOADERS[loader], {"d_in": 16, "d_sae": 64, "dtype": "float32"}
    if "transcoder" in loader:
        sizes["d_out"] = 16
    cfg, state, _ = module(repo, place, "cpu", cfg_overrides={"dtype": "float32"} if loader == "gemma_3" else sizes)
    cfg = loaders.handle_config_defaulting(cfg)
    sae = sae_lens.SAE.from_dict(cfg)
    sae.process_state_dict_for_loading(state)
    sae.load_state_dict(state)
    if cfg["normalize_activations"] == "expected_average_only_in":
        about = json.loads(Path(local(repo, "hyperparams.json", place)).read_text())
        sae.fold_activation_norm_scaling_factor(16**0.5 / about["dataset_average_activation_norm"]["in"])
    x = load_file(folder / "x.safetensors")[str(sae.cfg.d_in)]
    if sae.cfg.reshape_activations == "hook_z":  # it takes activations by head
        sae.turn_off_forward_pass_hook_z_reshaping()
    with torch.no_grad():
        results["theirs." + name + ".z"], results["theirs." + name + ".y"] = sae.encode(x), sae(x)
save_file(results, folder / "results.safetensors")
"""

TRACER_SIDE = """
import json, sys
from pathlib import Path
import torch
from circuit_tracer.transcoder import single_layer_transcoder as tracer
from safetensors.torch import load_file, save_file

folder, names = Path(sys.argv[1]), json.loads(sys.argv[2])
x, results = load_file(folder / "x.safetensors")["16"], {}
for name in names:
    sae = tracer.load_relu_transcoder(str(folder / "theirs" / name / "layer_3.safetensors"), 3, torch.device("cpu"))
    with torch.no_grad():
        results["theirs." + name + ".z"], results["theirs." + name + ".y"] = sae.encode(x), sae(x)
    sae.to_safetensors(str(folder / "theirs" / name / "layer_3.safetensors"))  # as circuit-tracer itself writes them
save_file(results, folder / "results.safetensors")
"""

DICTIONARY_SIDE = """
import importlib, json, sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file

folder, theirs = Path(sys.argv[1]), json.loads(sys.argv[2])
x, results = load_file(folder / "x.safetensors")["16"], {}
torch.manual_seed(0)
for name, (module, kind, more) in theirs.items():
    ae = getattr(importlib.import_module("dictionary_learning." + module), kind)(16, 64, **more)
    for weight in ae.parameters():
        torch.nn.init.normal_(weight)
    for key, value in ae.named_buffers():
        if key == "threshold":
            value.fill_(1.5)
    if name == "jumprelu":
        ae.threshold.data.uniform_(0, 3)
    (folder / "theirs" / name).mkdir(parents=True)
    torch.save(ae.state_dict(), folder / "theirs" / name / "ae.pt")
    config = {"trainer": {"dict_class": kind, "activation_dim": 16, "dict_size": 64}, "buffer": {}}
    (folder / "theirs" / name / "config.json").write_text(json.dumps(config))
    with torch.no_grad():
        z = ae.encode(x)
        results["theirs." + name + ".z"], results["theirs." + name + ".y"] = z, ae.decode(z)
save_file({name: value.contiguous() for name, value in results.items()}, folder / "results.safetensors")
"""


@pytest.fixture(scope="module")
def saelens(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("released")
    places = {name: folder / "theirs" / repo / place for name, (_, repo, place) in LAYOUTS.items()}
    write_gemma_scope(places["gemma-scope"])
    write_gemma_scope(places["gemma-scope-transcoder"])
    write_llama_scope(places["llama-scope"])
    write_gemma_scope_2(places["gemma-scope-2"])
    write_gemma_scope_2(places["gemma-scope-2-attention"], 24)
    about = {"model_name": "gemma-v3-270m-pt", "hf_hook_point_in": "model.layers.3.pre_feedforward_layernorm.output"}
    write_gemma_scope_2(places["gemma-scope-2-transcoder"], **about, hf_hook_point_out="model.layers.3.x.output")
    write_gemma_scope_2(places["gemma-scope-2-skip"])
    write_qwen_scope(places["qwen-scope"])
    write_linear(places["goodfire"], "_linear")
    write_linear(places["qresearch"], "")
    write_traced(places["mwhanna"])
    sizes = {"d_model": {"value": D}, "d_feature": {"value": N}, "batch_size": {"value": 1}}
    (places["mwhanna"].parent / "wandb-config.yaml").write_text(json.dumps(sizes))
    (places["mwhanna"].parent / "config.yaml").write_text(json.dumps({"model_name": "Qwen/Qwen3-4B"}))
    return folder, in_its_environment("sae-lens", SAELENS_SIDE, folder, LAYOUTS)


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("traced")
    for name, more in TRACED.items():
        write_traced(folder / "theirs" / name / "layer_3.safetensors", more)
    return folder, in_its_environment("circuit-tracer", TRACER_SIDE, folder, list(TRACED))


@pytest.fixture(scope="module")
def dictionaries(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("dictionaries")
    return folder, in_its_environment("dictionary-learning", DICTIONARY_SIDE, folder, DICTIONARIES)


@pytest.mark.parametrize("name", LAYOUTS)
def test_releases_are_what_saelens_makes_of_them(saelens: tuple[Path, dict[str, torch.Tensor]], name: str) -> None:
    folder, results = saelens
    _, repo, place = LAYOUTS[name]
    assert_alike(folder, "theirs", name, results, f"{repo}/{place}")
    sae = load(folder / "theirs" / repo, place)
    assert sae.is_transcoder == (name == "mwhanna" or name.endswith(("transcoder", "skip")))
    assert (sae.W_skip is not None) == name.endswith("skip") and sae.k == (5 if name == "qwen-scope" else None)


@pytest.mark.parametrize("name", TRACED)
def test_transcoders_are_what_circuit_tracer_makes_of_them(
    traced: tuple[Path, dict[str, torch.Tensor]], name: str
) -> None:
    folder, results = traced
    assert_alike(folder, "theirs", name, results, f"{name}/layer_3.safetensors")


@pytest.mark.parametrize("name", DICTIONARIES)
def test_we_load_what_dictionary_learning_saves(dictionaries: tuple[Path, dict[str, torch.Tensor]], name: str) -> None:
    folder, results = dictionaries
    assert_alike(folder, "theirs", name, results)


def test_gemma_scope_by_hand(tmp_path: Path) -> None:
    write_gemma_scope(tmp_path / "layer_3")
    sae = load(tmp_path, "layer_3")
    w, x = weights(), torch.randn(7, D, generator=torch.Generator().manual_seed(0))
    score = x @ w["encoder.weight"].T + w["encoder.bias"]
    z = torch.where((score > torch.linspace(-0.5, 3, N)) & (score > 0), score, 0)
    values, indices = sae.encode(x)
    torch.testing.assert_close(torch.zeros_like(z).scatter_add(1, indices, values), z, rtol=0, atol=1e-5)
    torch.testing.assert_close(sae(x), z @ w["decoder.weight"].T + w["decoder.bias"], rtol=0, atol=1e-5)


def dense(sae: SAE, x: torch.Tensor) -> torch.Tensor:
    values, indices = sae.encode(x)
    return torch.zeros(len(x), sae.latents).scatter_add(1, indices, values)


@pytest.mark.parametrize("kind", ["resid_post_all", "transcoder_all"])
def test_gemma_scope_2_by_hand(tmp_path: Path, kind: str) -> None:
    """`transcoder` in the folder's name, or an output in config.json, makes it a transcoder."""
    place = f"{kind}/layer_3_width_16k_l0_small" + "_affine" * (kind == "transcoder_all")
    write_gemma_scope_2(tmp_path / "gemma-scope-2-1b-pt" / place)
    sae, w = load(tmp_path / "gemma-scope-2-1b-pt", place), by_saelens_names()
    x = torch.randn(7, D, generator=torch.Generator().manual_seed(0))
    score = x @ w["W_enc"] + w["b_enc"]
    z = torch.where((score > torch.linspace(-0.5, 3, N)) & (score > 0), score, 0)
    torch.testing.assert_close(dense(sae, x), z, rtol=0, atol=1e-5)
    y = z @ w["W_dec"] + w["b_dec"]
    if sae.is_transcoder:
        y += x @ torch.randn(D, D, generator=torch.Generator().manual_seed(5))  # stored as [d_in, d]
    torch.testing.assert_close(sae(x), y, rtol=0, atol=1e-4)
    assert sae.is_transcoder == (kind == "transcoder_all")
    write_gemma_scope_2(tmp_path / "told", hf_hook_point_out="model.layers.3.post_feedforward_layernorm.output")
    assert load(tmp_path / "told").is_transcoder


@pytest.mark.parametrize("kind", ["qwen-scope", "goodfire", "circuit-tracer"])
def test_single_files_by_hand(tmp_path: Path, kind: str) -> None:
    w, x = by_saelens_names(), torch.randn(7, D, generator=torch.Generator().manual_seed(0))
    score, skip = (x @ w["W_enc"] + w["b_enc"]).relu(), torch.zeros(D, D)
    if kind == "qwen-scope":
        file = tmp_path / "SAE-Res-Qwen3-1.7B-Base-W32K-L0_4/layer3.sae.pt"
        write_qwen_scope(file)
        z = torch.zeros_like(score).scatter(1, *reversed(score.topk(4)))
    elif kind == "goodfire":
        file, z = tmp_path / "sae/Llama-3.1-8B-Instruct-SAE-l19.pth", score
        write_linear(file, "_linear")
    else:
        file, z = tmp_path / "qwen3-4b/layer_3.safetensors", score
        write_traced(file, ["W_skip"])
        skip = torch.randn(D, D, generator=torch.Generator().manual_seed(6))
    for sae in (load(file), load(file.parent, file.name)):
        torch.testing.assert_close(dense(sae, x), z, rtol=0, atol=1e-5)
        torch.testing.assert_close(sae(x), z @ w["W_dec"] + w["b_dec"] + x @ skip.T, rtol=0, atol=1e-4)
        assert sae.is_transcoder == (kind == "circuit-tracer")
    # Written in SAELens' layout, as stage `train` does, it computes the same.
    save(sae, tmp_path / "saved", {"model_name": "m", "hook_name": "layers.3"})
    torch.testing.assert_close(load(tmp_path / "saved")(x), sae(x), rtol=0, atol=1e-5)


def test_a_name_that_does_not_tell_what_it_should_is_refused(tmp_path: Path) -> None:
    write_qwen_scope(tmp_path / "mine/layer3.sae.pt")
    with pytest.raises(UserError, match=r"layer3\.sae\.pt: the name of its folder does not tell k; keep"):
        load(tmp_path / "mine", "layer3.sae.pt")
    write_gemma_scope(tmp_path / "gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6")
    with pytest.raises(UserError, match="an SAE of the token embeddings; allowed: SAEs of the blocks"):
        load(tmp_path / "gemma-scope-2b-pt-res", "embedding/width_4k/average_l0_6")


@pytest.mark.parametrize("is_of_output", [True, False])
def test_a_llama_scope_transcoder_has_a_norm_at_each_end(tmp_path: Path, is_of_output: bool) -> None:
    """The threshold is one of raw activations: of what a latent adds to the output (rows of norm 1), or of scores."""
    norms = {"in": 64.0, "out": 3.0}
    write_llama_scope(
        tmp_path, hook_point_out="blocks.3.hook_mlp_out", dataset_average_activation_norm=norms,
        jump_relu_threshold=2.0, sparsity_include_decoder_norm=is_of_output,
    )  # fmt: skip
    sae = load(tmp_path)
    w, x = weights(), torch.randn(7, D, generator=torch.Generator().manual_seed(0)) * 10
    score = x * 4 / 64 @ w["encoder.weight"].T + w["encoder.bias"]
    raw_score, raw_output = score * 64 / 4, score * 3 / 4
    z = torch.where((raw_output if is_of_output else raw_score) > 2.0, score, 0).clamp(min=0)
    assert 0 < int((z > 0).sum()) < int((score > 0).sum())
    y = (z @ w["decoder.weight"].T + w["decoder.bias"]) * 3 / 4
    torch.testing.assert_close(sae(x), y, rtol=0, atol=1e-4)
    assert sae.b_in is not None


@pytest.mark.parametrize(
    ("write", "changes", "message"),
    [
        (write_llama_scope, {"act_fn": "topk"}, "act_fn is 'topk'; allowed: 'jumprelu'"),
        (write_llama_scope, {"jump_relu_threshold": "no"}, "jump_relu_threshold is 'no'; allowed: a number above 0"),
        (write_llama_scope, {"dataset_average_activation_norm": {"in": 0, "out": 1}}, "norm.in is 0; allowed"),
        (write_llama_scope, {"dataset_average_activation_norm": None}, r"hyperparams\.json: "),
        (write_gemma_scope, {"scaling_factor": np.full(N, 2.0)}, "scaling_factor is not 1"),
        (write_gemma_scope, {"W_enc": np.zeros((3, 3))}, r"params\.npz: "),
    ],
)
def test_what_a_release_says_and_we_cannot_compute_is_named(
    tmp_path: Path, write: Any, changes: dict[str, Any], message: str
) -> None:
    write(tmp_path / "sae", **changes)
    with pytest.raises(UserError, match=message):
        load(tmp_path / "sae")


@pytest.mark.parametrize("norms", [torch.ones(N), torch.linspace(0.5, 2, N)])
def test_a_llama_scope_latent_fires_by_what_it_adds_to_the_output(tmp_path: Path, norms: torch.Tensor) -> None:
    write_llama_scope(tmp_path)
    w = weights() | {"decoder.weight": weights()["decoder.weight"] * norms}
    save_file({name: value.contiguous() for name, value in w.items()}, tmp_path / "checkpoints/final.safetensors")
    x = torch.randn(7, D, generator=torch.Generator().manual_seed(0))
    score = x * 4 / 6.25 @ w["encoder.weight"].T + w["encoder.bias"]
    fires = score * w["decoder.weight"].norm(dim=0) * 6.25 / 4 > 0.4
    y = (torch.where(fires, score, 0) @ w["decoder.weight"].T + w["decoder.bias"]) * 6.25 / 4
    torch.testing.assert_close(load(tmp_path)(x), y, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["BatchTopKSAE", "MatryoshkaBatchTopKSAE"])
def test_a_threshold_that_was_never_set_is_refused(tmp_path: Path, kind: str) -> None:
    write_dictionary(tmp_path / "set", kind)
    assert load(tmp_path / "set").threshold.unique().tolist() == [1.5]
    write_dictionary(tmp_path / "unset", kind, threshold=torch.tensor(-1.0))
    with pytest.raises(UserError, match=rf"config\.json: the threshold of {kind} was never set"):
        load(tmp_path / "unset")
    write_dictionary(tmp_path / "topk", "AutoEncoderTopK", threshold=torch.tensor(-1.0))
    assert load(tmp_path / "topk").k == 4  # which does not use it


@pytest.mark.parametrize("architecture", ["topk", "standard", None])
@pytest.mark.parametrize("key", ["activation_fn", "activation_fn_str"])
def test_topk_of_saelens_before_release_6(tmp_path: Path, architecture: str | None, key: str) -> None:
    changes = {key: "topk", "activation_fn_kwargs": {"k": 4}, "normalize_activations": False}
    write_saelens(tmp_path / "old", architecture=architecture, **changes)
    write_saelens(tmp_path / "new", architecture="topk", k=4)
    x = torch.randn(7, D, generator=torch.Generator().manual_seed(0))
    old, new = load(tmp_path / "old"), load(tmp_path / "new")
    assert old.k == 4 and torch.equal(old(x), new(x))


FILES = {
    "sae_weights.safetensors": write_saelens,
    "sae.safetensors": write_sparsify,
    "params.npz": write_gemma_scope,
    "checkpoints/final.safetensors": write_llama_scope,
    "params.safetensors": write_gemma_scope_2,
    "ae.pt": lambda folder: write_dictionary(folder, "BatchTopKSAE"),
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("fault", ["module.", "_orig_mod.", "one lacks", "fewer latents", "narrower", "none"])
def test_tensors_that_are_missing_or_misshapen_are_refused_in_every_format(
    tmp_path: Path, file: str, fault: str
) -> None:
    FILES[file](tmp_path / "sae")
    path = tmp_path / "sae" / file
    read = {".npz": lambda: {k: torch.from_numpy(v) for k, v in np.load(path).items()}, ".pt": lambda: torch.load(path)}
    tensors = read.get(path.suffix, lambda: load_file(path))()
    decoder = next(name for name in ("W_dec", "w_dec", "decoder.weight") if name in tensors)
    if fault.endswith("."):
        changed = {fault + name: value for name, value in tensors.items()}
    elif fault == "one lacks":
        changed = {name: value for name, value in tensors.items() if name != decoder}
    else:
        axis = int((fault == "fewer latents") == (decoder == "decoder.weight"))
        part = tensors[decoder].narrow(axis, 0, tensors[decoder].shape[axis] - (fault != "none"))
        changed = tensors | {decoder: part.clone()}
    if path.suffix == ".npz":
        np.savez(path, **{name: value.numpy() for name, value in changed.items()})
    elif path.suffix == ".pt":
        torch.save(changed, path)
    else:
        save_file(changed, path)
    if fault == "none":
        assert load(tmp_path / "sae").latents == N
        return
    message = rf"the key '[\w.]+'; its tensors: {fault}" if fault.endswith(".") else f"the key '{decoder}'"
    with pytest.raises(UserError, match=message if fault in ("module.", "_orig_mod.", "one lacks") else "sae"):
        load(tmp_path / "sae")


@pytest.mark.parametrize(
    ("write", "changes", "message"),
    [
        (write_saelens, {"d_sae": 2 * N}, f"d_sae is {2 * N}, but the weights have {N}"),
        (write_saelens, {"d_in": 2 * D}, f"d_in is {2 * D}, but the weights have {D}"),
        (write_sparsify, {"num_latents": 2 * N}, f"num_latents is {2 * N}, but the weights have {N}"),
        (write_llama_scope, {"d_model": 2 * D}, f"d_model is {2 * D}, but the weights have {D}"),
    ],
)
def test_settings_of_another_size_than_the_weights_are_refused(
    tmp_path: Path, write: Any, changes: dict[str, int], message: str
) -> None:
    write(tmp_path / "sae", **changes)
    with pytest.raises(UserError, match=message):
        load(tmp_path / "sae")


def test_a_skip_connection_that_only_the_weights_have_is_refused(tmp_path: Path) -> None:
    write_sparsify(tmp_path / "sae")
    path = tmp_path / "sae/sae.safetensors"
    save_file(load_file(path) | {"W_skip": torch.zeros(D, D)}, path)
    with pytest.raises(UserError, match="skip_connection is true without W_skip in the weights, or the other"):
        load(tmp_path / "sae")


def test_a_gated_dictionary_is_refused_by_its_name(tmp_path: Path) -> None:
    torch.save({"bias": torch.zeros(3)}, tmp_path / "ae.pt")
    (tmp_path / "config.json").write_text(json.dumps({"trainer": {"dict_class": "GatedAutoEncoder"}}))
    with pytest.raises(
        UserError, match=r"config\.json: trainer\.dict_class is 'GatedAutoEncoder'; allowed: AutoEncoder"
    ):
        load(tmp_path)


class Planted:
    """What a pickle would do when it is opened."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (os.environ["PLANTED"],)


@pytest.mark.parametrize("kind", ["ae.pt", "ae.pt as a bare pickle", "params.npz"])
def test_a_planted_pickle_is_refused_and_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setenv("PLANTED", str(tmp_path / "planted"))
    if kind == "params.npz":
        np.savez(tmp_path / "params.npz", W_enc=np.array([Planted()], dtype=object))
    else:
        (tmp_path / "config.json").write_text(json.dumps({"trainer": {"dict_class": "AutoEncoder"}}))
        if kind == "ae.pt":
            torch.save({"bias": Planted()}, tmp_path / "ae.pt")
        else:
            (tmp_path / "ae.pt").write_bytes(pickle.dumps(Planted()))
    with pytest.raises(UserError, match=f"{kind.split()[0]}: not a readable file of"):
        load(tmp_path)
    assert not (tmp_path / "planted").exists()


@pytest.mark.parametrize("file", ["params.npz", "ae.pt"])
@pytest.mark.parametrize("keep", [0, 40, 400])
def test_a_truncated_file_is_named(tmp_path: Path, file: str, keep: int) -> None:
    if file == "params.npz":
        write_gemma_scope(tmp_path / "sae")
    else:
        (tmp_path / "sae").mkdir()
        torch.save(weights(), tmp_path / "sae/ae.pt")
        (tmp_path / "sae/config.json").write_text(json.dumps({"trainer": {"dict_class": "AutoEncoder"}}))
    whole = (tmp_path / "sae" / file).read_bytes()
    (tmp_path / "sae" / file).write_bytes(whole[:keep])
    with pytest.raises(UserError, match=f"{file}: not a readable file of"):
        load(tmp_path / "sae")
