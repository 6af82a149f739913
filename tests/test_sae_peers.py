"""Our SAE files in the peers' own packages, and theirs in ours.

Each peer lives in an environment of its own, which `make bench` sets up; where there is none, these tests are skipped.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peers import assert_alike, in_its_environment

from babelscope.bridges import sparsify as sparsify_format
from babelscope.sae.autoencoder import SAE
from babelscope.sae.checkpoint import load, save

META = {"model_name": "made-up", "hook_name": "layers.1.mlp"}
# What we write (name: architecture in the file, width of the input), but for "topk_transcoder", which SAELens has not.
OURS = {
    "topk": ("topk", 16),
    "jumprelu": ("jumprelu", 16),
    "batchtopk": ("jumprelu", 16),
    "standard": ("standard", 16),
    "topk-transcoder": ("topk", 16),
    "jumprelu-transcoder": ("jumprelu_transcoder", 24),
    "relu-transcoder": ("transcoder", 24),
    "jumprelu-skip-transcoder": ("jumprelu_skip_transcoder", 24),
    "relu-skip-transcoder": ("skip_transcoder", 24),
}
# What SAELens writes: the class, and its settings beside d_in and d_sae.
SAELENS: dict[str, tuple[str, dict[str, Any]]] = {
    "topk-rescaled": ("TopKSAE", {"k": 4, "rescale_acts_by_decoder_norm": True}),
    "jumprelu": ("JumpReLUSAE", {}),
    "standard-no-input-bias": ("StandardSAE", {"apply_b_dec_to_input": False}),
    "transcoder": ("Transcoder", {"d_out": 12, "apply_b_dec_to_input": False}),
    "jumprelu-transcoder": ("JumpReLUTranscoder", {"d_out": 12, "apply_b_dec_to_input": False}),
    "skip-transcoder": ("SkipTranscoder", {"d_out": 12, "apply_b_dec_to_input": False}),
    "jumprelu-skip-transcoder": ("JumpReLUSkipTranscoder", {"d_out": 12, "apply_b_dec_to_input": False}),
}
SPARSIFY_OURS = ("topk", "topk-transcoder", "topk-skip-transcoder")
# What sparsify writes.
SPARSIFY: dict[str, dict[str, Any]] = {
    "autoencoder": {"transcode": False},
    "transcoder": {"transcode": True},
    "skip-transcoder": {"transcode": True, "skip_connection": True},
}

SAELENS_SIDE = """
import json, sys
from pathlib import Path
import sae_lens, torch
from safetensors.torch import load_file, save_file

folder, theirs = Path(sys.argv[1]), json.loads(sys.argv[2])
results, about = {}, {}

def keep(name, sae):
    x = load_file(folder / "x.safetensors")[str(sae.cfg.d_in)]
    with torch.no_grad():
        z = sae.encode(x)
        results[name + ".z"], results[name + ".y"] = z, sae(x)
    metadata = sae.cfg.metadata
    about[name] = [sae.cfg.architecture(), metadata.model_name, metadata.hook_name]

for path in sorted((folder / "ours").iterdir()):
    keep("ours." + path.name, sae_lens.SAE.load_from_disk(path))
torch.manual_seed(0)
for name, (kind, settings) in theirs.items():
    config = getattr(sae_lens, kind + "Config")(d_in=16, d_sae=64, **settings)
    sae = getattr(sae_lens, kind)(config)
    for weight in sae.parameters():
        torch.nn.init.normal_(weight)
    sae.save_model(folder / "theirs" / name)
    keep("theirs." + name, sae)
save_file(results, folder / "results.safetensors")
(folder / "about.json").write_text(json.dumps(about))
"""

SPARSIFY_SIDE = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from sparsify import SparseCoder, SparseCoderConfig

folder, theirs = Path(sys.argv[1]), json.loads(sys.argv[2])
x, results = load_file(folder / "x.safetensors")["16"], {}
torch.manual_seed(0)
for name, settings in theirs.items():
    sae = SparseCoder(16, SparseCoderConfig(num_latents=64, k=4, **settings))
    for weight in sae.parameters():
        torch.nn.init.normal_(weight)
    sae.save_to_disk(folder / "theirs" / name)
    with torch.no_grad():
        values, indices, _ = sae.encode(x)
        results["theirs." + name + ".z"] = torch.zeros(len(x), 64).scatter(1, indices, values)
        results["theirs." + name + ".y"] = sae(x).sae_out
for path in sorted((folder / "ours").iterdir()):
    sae = SparseCoder.load_from_disk(path)
    with torch.no_grad():
        values, indices, _ = sae.encode(x)
        results["ours." + path.name + ".z"] = torch.zeros(len(x), 64).scatter(1, indices, values)
        results["ours." + path.name + ".y"] = sae(x).sae_out
save_file(results, folder / "results.safetensors")
"""


@pytest.fixture(scope="module")
def saelens(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("sae-lens")
    draw = torch.Generator().manual_seed(0)
    for name, (_, d_in) in OURS.items():
        weights = [torch.randn(*shape, generator=draw) for shape in ((64, d_in), (64, 16), (64,), (16,))]
        b_in = torch.randn(d_in, generator=draw) if "transcoder" in name else None
        threshold = {"jumprelu": torch.rand(64, generator=draw), "batchtopk": torch.full((64,), 1.5)}
        if name.startswith("topk"):
            sae = SAE(*weights, 4, b_in=b_in)
        else:
            skip = torch.randn(16, d_in, generator=draw) if "skip" in name else None
            thresholds = threshold.get(name.split("-")[0], torch.zeros(64))
            sae = SAE(*weights, threshold=thresholds, b_in=b_in, W_skip=skip)
        save(sae, folder / "ours" / name, META)
    return folder, in_its_environment("sae-lens", SAELENS_SIDE, folder, SAELENS)


@pytest.fixture(scope="module")
def sparsify(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("sparsify")
    draw = torch.Generator().manual_seed(0)
    for name in SPARSIFY_OURS:
        weights = [torch.randn(*shape, generator=draw) for shape in ((64, 16), (64, 16), (64,), (16,))]
        b_in = torch.randn(16, generator=draw) if "transcoder" in name else None
        skip = torch.randn(16, 16, generator=draw) if "skip" in name else None
        sparsify_format.write(SAE(*weights, 4, b_in=b_in, W_skip=skip), folder / "ours" / name)
    return folder, in_its_environment("eai-sparsify", SPARSIFY_SIDE, folder, SPARSIFY)


@pytest.mark.parametrize("name", OURS)
def test_saelens_loads_what_we_save(saelens: tuple[Path, dict[str, torch.Tensor]], name: str) -> None:
    folder, results = saelens
    assert_alike(folder, "ours", name, results)
    found = json.loads((folder / "about.json").read_text())[f"ours.{name}"]
    assert found == [OURS[name][0], META["model_name"], META["hook_name"]]


@pytest.mark.parametrize("name", SAELENS)
def test_we_load_what_saelens_saves(saelens: tuple[Path, dict[str, torch.Tensor]], name: str) -> None:
    folder, results = saelens
    assert_alike(folder, "theirs", name, results)
    assert (load(folder / "theirs" / name).b_in is not None) == ("transcoder" in name)


@pytest.mark.parametrize("name", SPARSIFY_OURS)
def test_sparsify_loads_what_we_export(sparsify: tuple[Path, dict[str, torch.Tensor]], name: str) -> None:
    folder, results = sparsify
    assert_alike(folder, "ours", name, results)


@pytest.mark.parametrize("name", SPARSIFY)
def test_we_load_what_sparsify_saves(sparsify: tuple[Path, dict[str, torch.Tensor]], name: str) -> None:
    folder, results = sparsify
    assert_alike(folder, "theirs", name, results)
    assert (load(folder / "theirs" / name).b_in is not None) == ("transcoder" in name)
