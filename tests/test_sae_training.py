"""Training end to end on a small made-up store: quality, exact resume, and the units of the result."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from babelscope.config import Hardware, Train
from babelscope.errors import UserError
from babelscope.sae.batches import Batches, permutation
from babelscope.sae.checkpoint import save
from babelscope.sae.module import SAETraining, auxiliary_loss, in_raw_units, rate_share, train
from babelscope.sae.quality import quality

HARDWARE = Hardware(accelerator="cpu", devices=1, num_nodes=1, strategy="auto", threads=0)
SETTINGS = Train(
    latents=128, k=4, tokens=64 * 120, batch=64, learning_rate=0.004, warmup=0.05, decay=0.2, encoder_scale=0.5,
    aux_k_coefficient=0.03125, dead_after=640, log_every=7, checkpoint_every=25,
)  # fmt: skip


class FakeStore:
    """The interface of `ActivationStore`, over sparse combinations of 64 directions with a large mean."""

    def __init__(self, rows: int = 3000, d: int = 32) -> None:
        generator = torch.Generator().manual_seed(5)
        directions = torch.randn(64, d, generator=generator)
        on = torch.rand(rows, 64, generator=generator).argsort(dim=1) < 3
        self.data = (on * torch.rand(rows, 64, generator=generator) @ directions + 2.0).half()
        self.rows, self.d, self.dtype, self.index = rows, d, torch.float16, {"model": "made-up"}

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        return self.data[rows]


def batches_of(store: Any, settings: Train = SETTINGS) -> Batches:
    return Batches(store, torch.arange(0, 2500), settings.batch, settings.tokens // settings.batch, seed=3)


def silent(step: int, metrics: Mapping[str, float]) -> None:
    pass


def run(folder: Path, settings: Train = SETTINGS, write: Any = silent) -> tuple[bytes, Any, Any]:
    trained = train(
        batches_of(FakeStore(), settings), settings, HARDWARE, seed=1, write=write, checkpoint=folder / "state.pt"
    )
    assert trained is not None
    sae, history = trained
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


def test_a_killed_run_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    whole, history, _ = run(tmp_path / "whole")

    def stop_at_63(step: int, metrics: Mapping[str, float]) -> None:
        if step == 63:
            raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run(tmp_path / "killed", write=stop_at_63)
    again: list[int] = []
    resumed, resumed_history, _ = run(tmp_path / "killed", write=lambda step, metrics: again.append(step))
    assert again[0] == 56  # the checkpoint of step 50 was used
    assert resumed == whole
    assert resumed_history == history


def test_a_checkpoint_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state.pt").write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match="state.pt"):
        run(tmp_path)


def test_a_batch_that_does_not_divide_among_the_devices_is_refused(tmp_path: Path) -> None:
    hardware = HARDWARE.model_copy(update={"devices": 3})
    with pytest.raises(UserError, match="train.batch"):
        train(batches_of(FakeStore()), SETTINGS, hardware, seed=1, write=silent, checkpoint=tmp_path / "state.pt")


def test_dead_latents_come_back(tmp_path: Path) -> None:
    """Latents that begin dead (by a bias that keeps them out of the top k) fire again with aux-k, and never without."""
    dead: dict[float, float] = {}
    for coefficient in (0.0, SETTINGS.aux_k_coefficient):
        settings = SETTINGS.model_copy(update={"aux_k_coefficient": coefficient, "tokens": 64 * 200})
        file = tmp_path / f"{coefficient}.pt"
        training = SAETraining(batches_of(FakeStore(), settings), settings, seed=1, write=silent, checkpoint=file)
        with torch.no_grad():
            training.sae.b_enc[:40] = -0.6
        training.idle[:40] = 10**6
        state = {"done": 0, "history": [], "module": training.state_dict()}
        torch.save(state | {"optimizer": training.configure_optimizers().state_dict()}, file)
        trained = train(batches_of(FakeStore(), settings), settings, HARDWARE, seed=1, write=silent, checkpoint=file)
        assert trained is not None
        dead[coefficient] = min(row["dead_share"] for row in trained[1])
    assert dead[0.0] == 40 / 128
    assert dead[SETTINGS.aux_k_coefficient] < 0.5 * dead[0.0]


def test_folding_the_scale_keeps_the_reconstruction() -> None:
    training = SAETraining(batches_of(FakeStore()), SETTINGS, seed=1, write=silent, checkpoint=Path("there-is-none.pt"))
    x = FakeStore().gather(torch.arange(100)).float()
    scaled = training.scale * x
    rows = FakeStore().gather(torch.arange(2500)).float()
    torch.testing.assert_close((training.scale * rows).square().sum(1).mean(), torch.tensor(32.0))
    folded = in_raw_units(training.sae, training.scale)
    torch.testing.assert_close(training.sae(scaled) / training.scale, folded(x), rtol=1e-4, atol=1e-4)
    inside, outside = training.sae.encode(scaled)[0], folded.encode(x)[0]
    torch.testing.assert_close(inside.sort().values / training.scale, outside.sort().values, rtol=1e-4, atol=1e-4)


def test_the_auxiliary_loss_is_the_residual_that_dead_latents_leave() -> None:
    training = SAETraining(batches_of(FakeStore()), SETTINGS, seed=1, write=silent, checkpoint=Path("there-is-none.pt"))
    sae, x = training.sae, torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    error = torch.randn(50, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        sae.b_enc.fill_(-1e3)  # nothing fires: nothing is explained
    loss = auxiliary_loss(sae, x, error, torch.arange(10))
    expected = error.square().sum() / 50
    torch.testing.assert_close(loss, expected)


def test_the_learning_rate_rises_stays_and_falls() -> None:
    shares = [rate_share(step, 100, 0.1, 0.2) for step in range(100)]
    assert shares[0] == pytest.approx(0.1)
    assert shares[9] == shares[50] == shares[80] == 1.0
    assert shares[90] == pytest.approx(0.5)
    assert shares[99] == pytest.approx(0.05)
    assert [rate_share(step, 3, 0.0, 0.0) for step in range(3)] == [1.0, 1.0, 1.0]


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
        together = torch.cat(parts)
        expected = store.gather(batches.rows_of(number))
        assert torch.equal(together.float().sort(0).values, expected.float().sort(0).values)
    assert len(shares[0]) == 3


def test_moments_are_those_of_the_rows() -> None:
    store = FakeStore()
    mean, norm = batches_of(store).moments()
    x = store.data[:2500].double()
    torch.testing.assert_close(mean.double(), x.mean(0), rtol=1e-5, atol=1e-6)
    assert norm == pytest.approx(float(x.square().sum(1).mean()), rel=1e-5)
