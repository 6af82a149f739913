"""What is to hold on a CUDA device; skipped where there is none (`tests/test_triton_kernels.py` is not)."""

from pathlib import Path
from typing import Any

import pytest
import test_ablation as ablating
import test_activations as extracting
import test_sae_training as training
import test_streaming as streaming
import torch
from test_sae_step import WEIGHTS, dense, example

from babelscope.ablation import ablate
from babelscope.activations import extraction, store
from babelscope.config.schema import Hardware
from babelscope.sae.kernels import fused
from babelscope.sae.metrics import quality
from babelscope.sae.training import decoder
from babelscope.sae.training.graph import Graph
from babelscope.sae.training.step import sparse_step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
GPU = Hardware(accelerator="gpu", devices=1, num_nodes=1, strategy="auto", threads=0, checkpoint_seconds=0, parallel=1)


def test_the_kernels_are_used() -> None:
    assert fused(torch.zeros(1, device="cuda")) is not None
    assert fused(torch.zeros(1)) is None


@pytest.mark.parametrize("screen", [torch.bfloat16, torch.float32, None])
@pytest.mark.parametrize(
    ("latents", "k", "shift"), [(512, 8, 0.0), (100, 8, 0.0), (512, 8, -1.2), (512, 8, -99.0), (40, 40, 0.0)]
)
def test_gradients_are_those_of_dense_autograd(latents: int, k: int, shift: float, screen: torch.dtype | None) -> None:
    sae, x = example(latents, k)
    with torch.no_grad():
        sae.b_enc.add_(shift)
    loss, gradients, _ = dense(sae, x)
    step = sparse_step(sae.cuda(), x.cuda(), screen=screen)
    step.loss.backward()
    torch.testing.assert_close(step.loss.double().cpu(), loss, rtol=1e-5, atol=0)
    for name, expected in zip(WEIGHTS, gradients, strict=True):
        assert (getattr(sae, name).grad.double().cpu() - expected).norm() <= 1e-5 * expected.norm(), name


KINDS = [{}, {"activation": "batchtopk"}, {"activation": "jumprelu"}, {"activation": "relu"}, {"matryoshka": [32, 64]}]


@pytest.mark.parametrize("changes", KINDS, ids=str)
def test_training_is_as_good_as_on_a_cpu_and_the_same_every_time(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = training.SETTINGS.model_copy(update=changes)
    *_, on_cpu = training.run(tmp_path / "cpu", settings)
    monkeypatch.setattr(training, "HARDWARE", GPU)
    first, history, on_gpu = training.run(tmp_path / "gpu", settings)
    again, again_history, _ = training.run(tmp_path / "again", settings)
    assert (again, again_history) == (first, history)
    rows, code = torch.arange(2500, 3000), torch.zeros(500, dtype=torch.int64)
    fvu = [quality(sae, training.FakeStore(), rows, code, 1).fvu for sae in (on_cpu, on_gpu)]  # type: ignore[arg-type]
    assert fvu[1] == pytest.approx(fvu[0], abs=0.02)


@pytest.mark.parametrize("changes", [{}, {"dead_after": 10**6}], ids=str)
def test_replaying_the_passes_gives_the_same_bytes(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "HARDWARE", GPU)
    settings = training.SETTINGS.model_copy(update=changes)
    replayed = training.run(tmp_path / "replayed", settings)[:2]
    monkeypatch.setattr(Graph, "suits", staticmethod(lambda *_: False))
    assert training.run(tmp_path / "run", settings)[:2] == replayed


@pytest.mark.parametrize("d", [32, 640, 701, 2048, 4096, 8192])
def test_the_kernel_that_updates_the_decoder_agrees_with_torch(d: int) -> None:
    assert decoder._agrees(torch.device("cuda"), d)


@pytest.mark.parametrize("changes", [{}, {"frozen": "decoder"}, {"activation": "batchtopk"}], ids=str)
def test_training_is_as_good_with_the_decoder_updated_in_one_pass(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "HARDWARE", GPU)
    settings = training.SETTINGS.model_copy(update=changes)
    one = training.run(tmp_path / "one", settings)[1]
    monkeypatch.setattr(decoder, "update_", lambda *_: False)
    three = training.run(tmp_path / "three", settings)[1]
    assert one[0]["loss"] == pytest.approx(three[0]["loss"], rel=1e-4)
    assert one[-1]["fvu"] == pytest.approx(three[-1]["fvu"], abs=0.02)


def test_a_killed_run_resumes_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "HARDWARE", GPU)
    training.test_a_killed_run_resumes_to_the_same_bytes(tmp_path, monkeypatch)


@pytest.mark.parametrize("changes", [{}, {"transcode": True}], ids=str)
def test_a_killed_stream_resumes_to_the_same_bytes(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "HARDWARE", GPU)
    resume = streaming.test_a_killed_run_resumes_to_the_same_bytes_at_every_hookpoint
    resume(streaming.make_model().cuda(), tmp_path, changes, monkeypatch)


@pytest.mark.parametrize("strategy", ["auto", "fsdp"])
def test_extraction_gives_what_a_cpu_gives(strategy: str, tmp_path: Path) -> None:
    model, names = ablating.make("llama"), ["layers.0.mlp", "layers.2"]
    shards = extraction.plan(extracting.corpus()[0], batch_tokens=64, shard_rows=50)
    stores = []
    for hardware in (extracting.HARDWARE, GPU.model_copy(update={"strategy": strategy})):
        folder = tmp_path / hardware.accelerator
        extraction.extract(model, shards, names, folder, "float16", hardware)
        for name in names:
            store.write_index(folder / name, [shard.rows for shard in shards], ablating.D, "float16", "m", name)
        stores.append([store.ActivationStore(folder / name) for name in names])
    for on_cpu, on_gpu in zip(*stores, strict=True):
        rows = torch.arange(on_cpu.rows)
        torch.testing.assert_close(on_gpu.gather(rows), on_cpu.gather(rows), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("method", ablating.METHODS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_ablation_gives_what_a_cpu_gives(family: str, method: str) -> None:
    results = []
    for device in ("cpu", "cuda"):
        model = ablating.make(family).to(device)
        saes = {name: sae.to(device) for name, sae in ablating.make_saes(model).items()}
        _, make_one = ablating.METHODS[method]
        chosen = ablating.by_hookpoint(model, ablating.make_conditions(model), make_one(saes))
        results.append(ablate.ablate(model, chosen, ablating.make_texts(), 40))
    on_cpu, on_gpu = results
    rows = [row for row in range(len(on_cpu.ablated)) if (method, row) != ("directional", 1)]  # takes out all: noise
    torch.testing.assert_close(on_gpu.ablated[rows], on_cpu.ablated[rows], rtol=0, atol=1e-3)
    assert on_gpu.passes == on_cpu.passes
