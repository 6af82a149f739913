"""Training end to end on a small made-up store: quality, exact resume, and the units of the result."""

import math
import re
import subprocess
import sys
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import lightning
import pytest
import torch
from closure import ROOT
from lightning.pytorch.loggers import CSVLogger
from lightning_utilities.core import imports
from pydantic import ValidationError
from safetensors.torch import load_file

from babelscope.activations import batches as batches_module
from babelscope.activations.batches import Batches, permutation
from babelscope.activations.moments import moments
from babelscope.config.schema import Hardware, Train
from babelscope.core.errors import UserError
from babelscope.sae.checkpoint import save
from babelscope.sae.metrics import quality
from babelscope.sae.training import loop, module
from babelscope.sae.training.learner import Learner, auxiliary_loss
from babelscope.sae.training.loop import train
from babelscope.sae.training.module import Activations, SAETraining
from babelscope.sae.training.schedule import learning_rate, lr_multiplier
from babelscope.sae.training.trainer import _without, trainer

HARDWARE = Hardware(
    accelerator="cpu", devices=1, num_nodes=1, strategy="auto", threads=0, checkpoint_seconds=0, parallel=1
)
SETTINGS = Train(
    source="stored", activation="topk", matryoshka=None, transcode=False,
    latents=128, k=4, tokens=64 * 120, batch=64, learning_rate=0.004, warmup=0.05, decay=0.2, encoder_scale=0.5,
    aux_k_coefficient=0.03125, weight_decay=0.0, dead_after=640, log_every=7,
)  # fmt: skip


class FakeStore:
    """The interface of `ActivationStore`, over sparse combinations of 64 directions with a large mean."""

    def __init__(self, rows: int = 3000, d: int = 32) -> None:
        generator = torch.Generator().manual_seed(5)
        directions = torch.randn(64, d, generator=generator)
        on = torch.rand(rows, 64, generator=generator).argsort(dim=1) < 3
        self.data = (on * torch.rand(rows, 64, generator=generator) @ directions + 2.0).half()
        self.rows, self.d, self.dtype, self.index = rows, d, torch.float16, {"model": "made-up"}

    def gather(self, rows: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        return self.data[rows] if out is None else torch.index_select(self.data, 0, rows, out=out)


def batches_of(store: Any, settings: Train = SETTINGS) -> Batches:
    return Batches(store, torch.arange(0, 2500), settings.batch, settings.tokens // settings.batch, seed=3)


def silent(step: int, metrics: Mapping[str, float]) -> None:
    pass


def stop_at_63(step: int, metrics: Mapping[str, float]) -> None:
    if step == 63:
        raise KeyboardInterrupt


def run(folder: Path, settings: Train = SETTINGS, write: Any = silent) -> tuple[bytes, Any, Any]:
    trained = train(batches_of(FakeStore(), settings), settings, HARDWARE, seed=1, write=write, folder=folder)
    assert trained is not None
    [(sae, history)] = trained
    save(sae, folder, {"model_name": "made-up", "hook_name": "layers.0"})
    return (folder / "sae_weights.safetensors").read_bytes(), history, sae


def test_it_learns_and_its_result_is_in_the_units_of_the_store(tmp_path: Path) -> None:
    seen: list[int] = []
    _, history, sae = run(tmp_path, write=lambda step, metrics: seen.append(step))
    assert seen == [row["step"] for row in history] == [*range(7, 120, 7), 120]
    assert list(history[0]) == ["step", "tokens", "loss", "fvu", "l0", "dead_share", "learning_rate"]
    assert history[-1]["tokens"] == 7680
    store, held_out = FakeStore(), torch.arange(2500, 3000)
    result = quality(sae, store, held_out, torch.zeros(500, dtype=torch.int64), 1)  # type: ignore[arg-type]
    assert result.fvu < 0.35
    assert history[-1]["fvu"] < 0.5 * history[0]["fvu"]
    assert abs(history[-1]["fvu"] - result.fvu) < 0.1
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(128))


class Replay:
    """What `sae.graph.Graph` promises, without a GPU: the passes of the learner, and its gradients."""

    def __init__(self, learner: Learner, x: torch.Tensor, y: torch.Tensor | None) -> None:
        self.learner, self.shape = learner, x.shape

    @staticmethod
    def suits(learner: Learner, x: torch.Tensor) -> bool:
        return True

    def fits(self, x: torch.Tensor) -> bool:
        return x.shape == self.shape

    def __call__(self, x: torch.Tensor, y: torch.Tensor | None) -> Any:
        normal, step = self.learner.passes(x, y)
        step.loss.backward()
        return normal, step


def test_with_replayed_passes_a_run_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(tmp_path / "run")[:2]
    monkeypatch.setattr(module, "Graph", Replay)
    assert run(tmp_path / "replayed")[:2] == expected


def test_a_killed_run_resumes_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "_APART", 0)  # a checkpoint after every step
    whole, history, _ = run(tmp_path / "whole")
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run(tmp_path / "killed", write=stop_at_63)
    again: list[int] = []
    resumed, resumed_history, _ = run(tmp_path / "killed", write=lambda step, metrics: again.append(step))
    assert again[0] == 63  # the checkpoint of step 62 was used
    assert resumed == whole
    assert resumed_history == history


def test_checkpoints_take_a_small_share_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, saved = [0.0], []

    def write(path: Path, _: object) -> None:
        saved.append(now[0])
        now[0] += 0.5  # what writing takes

    def step(*_: object) -> None:
        now[0] += 1.0

    monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])
    monkeypatch.setattr("babelscope.sae.training.parts.write_atomically", write)
    monkeypatch.setattr(module.Learner, "before_update", step)
    hardware = HARDWARE.model_copy(update={"checkpoint_seconds": 10})
    train(batches_of(FakeStore()), SETTINGS, hardware, seed=1, folder=tmp_path / "none")
    assert saved == [10.0, 35.5, 61.0, 86.5, 112.0]  # after 10 s, then 50 times 0.5 s after each


@pytest.mark.parametrize("content", [b"", b"nothing of the kind", b"PK\x03\x04 and no more"])
def test_a_damaged_checkpoint_costs_a_new_start(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    whole = run(tmp_path / "whole")[:2]
    (tmp_path / "last.ckpt").write_bytes(content)
    assert run(tmp_path)[:2] == whole
    assert "last.ckpt: damaged; training starts from step 0" in caplog.text


@pytest.mark.parametrize("state", [{"module": {}, "done": 3}, torch.zeros(3), [1], None])
def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path, state: Any) -> None:
    torch.save(state, tmp_path / "last.ckpt")
    with pytest.raises(UserError, match="last.ckpt: not a checkpoint of this run; delete it"):
        run(tmp_path)


def test_a_batch_that_does_not_divide_among_the_devices_is_refused(tmp_path: Path) -> None:
    hardware = HARDWARE.model_copy(update={"devices": 3})
    with pytest.raises(UserError, match="train.batch"):
        train(batches_of(FakeStore()), SETTINGS, hardware, seed=1, folder=tmp_path)


def test_dead_latents_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Latents that begin dead (by a bias that keeps them out of the top k) fire again with aux-k, and never without."""

    def begin_dead(training: SAETraining, stage: str, setup: Any = SAETraining.setup) -> None:
        setup(training, stage)
        with torch.no_grad():
            training.each[0].sae.b_enc[:40] = -0.6
        training.each[0].tokens_since_fired[:40] = 10**6

    monkeypatch.setattr(SAETraining, "setup", begin_dead)
    dead: dict[float, float] = {}
    for coefficient in (0.0, SETTINGS.aux_k_coefficient):
        settings = SETTINGS.model_copy(update={"aux_k_coefficient": coefficient, "tokens": 64 * 200})
        _, history, _ = run(tmp_path / str(coefficient), settings)
        dead[coefficient] = min(row["dead_share"] for row in history)
    assert dead[0.0] == 40 / 128
    assert dead[SETTINGS.aux_k_coefficient] < 0.5 * dead[0.0]


def learner(settings: Train = SETTINGS) -> Learner:
    [(target, source)] = batches_of(FakeStore()).moments()
    assert source is None
    return Learner(settings, target.normalisation(), None, steps=120, seed=1)


@pytest.mark.parametrize("stretch", [1.0, 30.0])
def test_folding_the_normalisation_keeps_the_reconstruction(stretch: float) -> None:
    store = FakeStore()
    store.data[:, 0] *= stretch  # one dimension has nearly all of the variance
    [(target, source)] = batches_of(store).moments()
    assert (target.effective_dimensions < 2) == (stretch > 1) == (target.whitening() is not None)
    assert source is None
    training = Learner(SETTINGS, target.normalisation(), None, steps=120, seed=1)
    rows = training.target(store.gather(torch.arange(2500)))
    torch.testing.assert_close(rows.square().sum(1).mean(), torch.tensor(32.0), rtol=1e-3, atol=0)
    x = store.gather(torch.arange(100)).float()
    torch.testing.assert_close(training.target.inverse(training.target(x)), x, rtol=1e-3, atol=1e-3)
    folded = training.finished()
    back = training.target.inverse(training.sae(training.target(x)))
    torch.testing.assert_close(back, folded(x), rtol=1e-3, atol=1e-3)
    inside, outside = training.sae.encode(training.target(x))[0], folded.encode(x)[0]
    torch.testing.assert_close(inside.sort().values / target.scale, outside.sort().values, rtol=1e-3, atol=1e-3)
    if stretch == 1:
        torch.testing.assert_close(folded.W_dec.norm(dim=1), torch.ones(128))


def test_whitening_evens_out_the_spectrum() -> None:
    generator = torch.Generator().manual_seed(0)
    deviations = torch.tensor([100.0, 4.0, 1.0, 0.25])
    found = moments([torch.randn(20000, 4, generator=generator) * deviations + 1])
    maps = found.whitening()
    assert maps is not None
    forth, back = maps
    torch.testing.assert_close(forth @ back, torch.eye(4), rtol=1e-4, atol=1e-4)
    mapped = (forth.double() @ found.covariance @ forth.double()).diagonal().sqrt()
    torch.testing.assert_close(mapped / mapped[2], deviations.double().sqrt(), rtol=0.1, atol=0)


def test_rows_that_are_whitened_once_train_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FakeStore()
    store.data[:, 0] *= 30
    monkeypatch.setattr(loop, "_APART", 0)  # a checkpoint after every step

    def trained(folder: str, write: Any = silent) -> list[Any]:
        result = train(batches_of(store), SETTINGS, HARDWARE, seed=1, write=write, folder=tmp_path / folder)
        assert result is not None
        return [weight.tolist() for weight in result[0][0].parameters()]

    source = batches_of(store)
    learner = Learner(SETTINGS, source.moments()[0][0].normalisation(), None, steps=source.steps, seed=1)
    for [pair] in source.read():
        assert pair.normal is not None and torch.equal(pair.normal, learner.target(pair.x))
    kept = trained("kept")
    with pytest.raises((KeyboardInterrupt, SystemExit)):  # in the second pass
        trained("killed", stop_at_63)
    assert trained("killed") == kept
    monkeypatch.setattr(batches_module, "_KEPT", 0)
    assert trained("not kept") == kept


def test_rows_are_not_whitened_where_they_would_not_be_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    store = FakeStore()
    store.data[:, 0] *= 30
    one_pass = SETTINGS.model_copy(update={"tokens": 64 * 39})
    for source, world in ((batches_of(store), 2), (batches_of(store, one_pass), 1)):
        assert all(pair.normal is None for [pair] in source.read(world=world))
    source = batches_of(store)
    source.moments()
    monkeypatch.setattr(batches_module, "_KEPT", 4 * store.rows * store.d - 1)
    # It costs an eigendecomposition of d x d: minutes for a wide model.
    monkeypatch.setattr(batches_module.Moments, "whitening", lambda _: pytest.fail("computed for nothing"))
    assert all(pair.normal is None for [pair] in source.read())


@pytest.mark.parametrize("mean", [0.0, 1e3, 1e5])
def test_moments_of_activations_far_from_zero_keep_their_digits(mean: float) -> None:
    generator = torch.Generator().manual_seed(0)
    deviations = torch.tensor([4.0, 1.0, 0.25])
    x = torch.randn(30000, 3, generator=generator) * deviations + mean
    found = moments(torch.split(x, 4096))
    torch.testing.assert_close(found.mean, x.double().mean(0).float(), rtol=1e-6, atol=1e-3)
    torch.testing.assert_close(found.covariance, x.double().T.cov(correction=0), rtol=1e-4, atol=1e-4)


def test_a_logged_batch_without_variance_has_no_fvu() -> None:
    written: list[Mapping[str, float]] = []
    training = SAETraining(SETTINGS, steps=120, seed=1)
    training.build({0: (batches_of(FakeStore()).moments()[0][0].normalisation(), None)})
    logger = SimpleNamespace(log_metrics=lambda metrics, step: written.append(metrics))
    training._trainer = SimpleNamespace(world_size=1, strategy=None, loggers=[logger])  # type: ignore[assignment]
    training.record(7, 0.1, [torch.tensor([1.0, 0.5, 0.0, 4.0, 0.0])])
    training.record(14, 0.1, [torch.tensor([1.0, 0.5, 2.0, 4.0, 0.0])])
    assert math.isnan(written[0]["fvu"]) and written[1]["fvu"] == 0.25


def test_the_auxiliary_loss_is_the_residual_that_dead_latents_leave() -> None:
    sae, x = learner().sae, torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    error = torch.randn(50, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        sae.b_enc.fill_(-1e3)  # nothing fires: nothing is explained
    rows = slice(0, 10)
    loss = auxiliary_loss(sae.centre(x), error, sae.encoder[rows], sae.W_dec[rows], sae.b_enc[rows])
    torch.testing.assert_close(loss, error.square().sum() / 50)


def test_the_learning_rate_rises_stays_and_falls() -> None:
    shares = [lr_multiplier(step, 100, 0.1, 0.2) for step in range(100)]
    assert shares[0] == pytest.approx(0.1)
    assert shares[9] == shares[50] == shares[80] == 1.0
    assert shares[90] == pytest.approx(0.5)
    assert shares[99] == pytest.approx(0.05)
    assert [lr_multiplier(step, 3, 0.0, 0.0) for step in range(3)] == [1.0, 1.0, 1.0]


def test_the_rule_for_the_learning_rate_takes_over_where_none_is_given() -> None:
    settings = SETTINGS.model_copy(update={"learning_rate": None, "dead_after": None})
    training = SAETraining(settings, steps=120, seed=1)
    training.build({0: (batches_of(FakeStore()).moments()[0][0].normalisation(), None)})
    assert training.rate == learning_rate(128, 120)
    assert training.each[0].dead_after == 32 * 128 // 4
    assert learning_rate(4096, 1000) > learning_rate(16384, 1000) > learning_rate(16384, 10000)


class Rows(CSVLogger):  # type: ignore[misc]
    """A logger of Lightning's own that keeps what it is given in memory, too."""

    def log_metrics(self, metrics: Any, step: Any = None) -> None:
        rows.append({"step": step, **metrics})
        super().log_metrics(metrics, step)


rows: list[dict[str, float]] = []


def test_a_trainer_of_anybody_fits_it_and_its_checkpoint_is_loaded_without_the_data(tmp_path: Path) -> None:
    _, history, sae = run(tmp_path / "ours")
    rows.clear()
    training = SAETraining(SETTINGS, steps=120, seed=1)
    theirs = tmp_path / "theirs"
    options: dict[str, Any] = {
        "accelerator": "cpu", "default_root_dir": theirs, "enable_progress_bar": False, "enable_model_summary": False,
    }  # fmt: skip
    plain = lightning.Trainer(max_steps=120, logger=Rows(theirs), log_every_n_steps=7, **options)
    plain.fit(training, datamodule=Activations(batches_of(FakeStore())))
    assert training.histories == [history] == [rows]
    [path] = theirs.rglob("*.ckpt")
    loaded = SAETraining.load_from_checkpoint(path, map_location="cpu", weights_only=True)
    assert loaded.settings == SETTINGS and loaded.histories == [history]
    for found in (training.each[0].finished(), loaded.each[0].finished()):
        assert all(torch.equal(a, b) for a, b in zip(found.parameters(), sae.parameters(), strict=True))

    half = SAETraining(SETTINGS, steps=120, seed=1)
    lightning.Trainer(max_steps=60, logger=False, **options).fit(half, datamodule=Activations(batches_of(FakeStore())))
    [path] = set(theirs.rglob("*.ckpt")) - {path}
    again = SAETraining(SETTINGS, steps=120, seed=1)
    rest = lightning.Trainer(max_steps=120, logger=False, **options)
    rest.fit(again, datamodule=Activations(batches_of(FakeStore())), ckpt_path=path, weights_only=True)
    assert again.histories == [history]
    found = again.each[0].finished()
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), sae.parameters(), strict=True))


def test_the_lines_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "docs/training.md").read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {"settings": SETTINGS, "batches": batches_of(FakeStore())}
    exec(code, names)
    assert torch.equal(names["again"].each[0].finished().W_dec, names["sae"].W_dec)


def test_lightning_is_imported_without_what_it_does_not_need() -> None:
    code = "import sys, babelscope.sae.training.loop; assert not {'matplotlib', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_if_the_name_that_hides_packages_is_gone_everything_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    with _without(("numpy",)):
        assert imports.find_spec("numpy") is None and imports.find_spec("torch") is not None
        with pytest.raises(PackageNotFoundError):
            imports._version("numpy")
    monkeypatch.delattr(imports, "_version")
    with _without(("numpy",)):
        assert imports.find_spec("numpy") is not None


def test_without_its_data_module_it_says_so(tmp_path: Path) -> None:
    trainer = lightning.Trainer(accelerator="cpu", default_root_dir=tmp_path, logger=False, enable_checkpointing=False)
    with pytest.raises(UserError, match="fit with datamodule=Activations"):
        trainer.fit(SAETraining(SETTINGS, steps=120, seed=1), train_dataloaders=[torch.zeros(3)])


def test_devices_are_those_that_lightning_takes() -> None:
    worlds = {"auto": 1, 1: 1, 2: 2}
    for devices, world in worlds.items():
        assert trainer(HARDWARE.model_copy(update={"devices": devices})).world_size == world
    with pytest.raises(UserError, match=r"params.yaml: hardware: .*CPU"):
        trainer(HARDWARE.model_copy(update={"devices": [0]}))


@pytest.mark.parametrize("devices", ["auto", 3, [0, 2]])
def test_devices_in_params(devices: Any) -> None:
    content = HARDWARE.model_dump() | {"devices": devices}
    assert Hardware(**content).devices == devices


@pytest.mark.parametrize("devices", ["all", 0, -1, True, [], [0, 0], ["0"], 1.0, None])
def test_other_devices_are_refused(devices: Any) -> None:
    with pytest.raises(ValidationError, match="allowed: 'auto', a number of devices, or a list of their numbers"):
        Hardware(**(HARDWARE.model_dump() | {"devices": devices}))


def test_a_batch_is_a_pure_function_of_its_number() -> None:
    store, rows = FakeStore(), torch.arange(10, 110)
    one = Batches(store, rows, 30, 20, seed=7)  # type: ignore[arg-type]
    forward = [one.rows_of(step) for step in range(10)]
    other = Batches(store, rows, 30, 20, seed=7)  # type: ignore[arg-type]
    assert all(torch.equal(other.rows_of(step), forward[step]) for step in reversed(range(10)))
    seen = torch.cat(forward)
    assert torch.equal(seen.sort().values, rows.repeat_interleave(3))  # 300 rows: three whole epochs
    assert not torch.equal(permutation(7, 0, 100), permutation(7, 1, 100))
    assert not torch.equal(one.rows_of(0), Batches(store, rows, 30, 20, seed=8).rows_of(0))  # type: ignore[arg-type]


@pytest.mark.parametrize("world", [1, 2, 5])
def test_devices_share_the_same_global_batch(world: int) -> None:
    store = FakeStore()
    batches = Batches(store, torch.arange(100), 30, 4, seed=0)  # type: ignore[arg-type]
    shares = [list(batches.read(first=1, rank=rank, world=world)) for rank in range(world)]
    for number, parts in enumerate(zip(*shares, strict=True), start=1):
        assert all(pair.y is None for [pair] in parts)
        together = torch.cat([pair.x for [pair] in parts])
        expected = store.gather(batches.rows_of(number))
        assert torch.equal(together.float().sort(0).values, expected.float().sort(0).values)
    assert len(shares[0]) == 3


def test_peers_of_the_benchmark_get_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    for name in ("peers.process", "peers.worker"):  # there is another `peers` in tests/
        monkeypatch.setitem(sys.modules, name, MagicMock())
    sae_quality = import_module("sae_quality")
    monkeypatch.setattr(sae_quality, "ACTIVATIONS", tmp_path)
    monkeypatch.setattr(sae_quality, "SCRATCH", tmp_path)
    monkeypatch.setattr(sae_quality, "dvc_md5", str)
    data, store = object.__new__(sae_quality.Data), FakeStore()
    data.hookpoint, data.batches = "layers.0", batches_of(store)
    with data.file() as (path, _):
        expected = torch.cat([store.gather(data.batches.rows_of(step)) for step in range(120)])
        assert torch.equal(load_file(path)["activations"], expected)


def test_moments_are_those_of_the_rows() -> None:
    store = FakeStore()
    [(found, source)] = batches_of(store).moments()
    assert source is None
    x = store.data[:2500].double()
    torch.testing.assert_close(found.mean.double(), x.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.covariance, x.T.cov(correction=0), rtol=1e-4, atol=1e-5)
    assert found.scale == pytest.approx(float((32 / x.square().sum(1).mean()) ** 0.5), rel=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"activation": "batchtopk"},
        {"activation": "jumprelu"},
        {"activation": "relu"},
        {"matryoshka": [16, 48]},
        {"activation": "batchtopk", "matryoshka": [32]},
    ],
    ids=str,
)
def test_every_activation_learns_to_reconstruct_with_about_k_latents(tmp_path: Path, changes: dict[str, Any]) -> None:
    settings = SETTINGS.model_copy(update={"tokens": 64 * 600, **changes})
    _, history, sae = run(tmp_path, settings)
    result = quality(sae, FakeStore(), torch.arange(2500, 3000), torch.zeros(500, dtype=torch.int64), 1)  # type: ignore[arg-type]
    assert (sae.k is None) == (settings.activation != "topk")
    # Three directions make a row: what adapts its number of latents may find that four are too many.
    assert 2.5 < result.l0 < 5
    assert result.fvu < (0.8 if settings.activation == "relu" else 0.35)  # an L1 penalty shrinks what it keeps
    assert result.l0_of == pytest.approx([result.l0])
    assert history[-1]["l0"] == pytest.approx(result.l0, rel=0.25)


def test_a_matryoshka_prefix_reconstructs_better_than_that_of_a_plain_sae(tmp_path: Path) -> None:
    fvu = {}
    for name, widths in (("plain", None), ("nested", [16, 48])):
        settings = SETTINGS.model_copy(update={"matryoshka": widths})
        *_, sae = run(tmp_path / name, settings)
        x = FakeStore().gather(torch.arange(2500, 3000)).float()
        values, indices = sae.encode(x)
        error = sae.decode(values.where(indices < 16, 0.0), indices).detach() - x
        fvu[name] = float(error.square().sum() / (x - x.mean(0)).square().sum())
    assert fvu["nested"] < 0.9 * fvu["plain"]


def test_a_transcoder_learns_the_map_from_input_to_output(tmp_path: Path) -> None:
    target, source = FakeStore(), FakeStore(d=24)
    source.data = (target.data.float() @ torch.randn(32, 24, generator=torch.Generator().manual_seed(2)) + 1).half()
    settings = SETTINGS.model_copy(update={"transcode": True, "tokens": 64 * 400})
    batches = Batches(target, torch.arange(2500), 64, 400, seed=3, inputs=source)  # type: ignore[arg-type]
    trained = train(batches, settings, HARDWARE, seed=1, folder=tmp_path)
    assert trained is not None
    [(sae, history)] = trained
    assert (sae.d_in, sae.d) == (24, 32) and sae.b_in is not None
    rows, nothing = torch.arange(2500, 3000), torch.zeros(500, dtype=torch.int64)
    result = quality(sae, target, rows, nothing, 1, source)  # type: ignore[arg-type]
    assert result.fvu < 0.5
    assert abs(history[-1]["fvu"] - result.fvu) < 0.15


@pytest.mark.parametrize("frozen", ["decoder", "encoder"])
def test_frozen_weights_stay_as_initialised(tmp_path: Path, frozen: str) -> None:
    settings = SETTINGS.model_copy(update={"frozen": frozen, "dead_after": 64})
    short = settings.model_copy(update={"tokens": 64})
    first, last = (run(tmp_path / str(each.tokens), each)[2] for each in (short, settings))
    pairs = {"decoder": (first.W_dec, last.W_dec), "encoder": (first.encoder, last.encoder)}
    for name, (before, after) in pairs.items():
        change = (after - before).norm() / before.norm()
        assert change < 1e-5 if name == frozen else change > 0.1, name


def test_weight_decay_shortens_encoder_rows_alone() -> None:
    settings = SETTINGS.model_copy(update={"weight_decay": 2.0, "warmup": 0.0, "decay": 0.0})
    training = SAETraining(settings, steps=10, seed=1)
    training.build({0: (moments([FakeStore().data]).normalisation(), None)})
    optimizer = training.configure_optimizers()["optimizer"]
    before = {name: weight.detach().clone() for name, weight in training.named_parameters()}
    for weight in training.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    for name, weight in training.named_parameters():
        factor = 1 - 2.0 * 0.004 if name.endswith("encoder") else 1.0
        torch.testing.assert_close(weight, before[name] * factor, rtol=1e-6, atol=0)
