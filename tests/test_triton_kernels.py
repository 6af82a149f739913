"""The CUDA path's kernels against PyTorch's own operations: on a GPU, elsewhere in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import test_sae_training as training
import torch
from test_sae_step import WEIGHTS, dense, example

from babelscope.sae.screening import ExactTopK
from babelscope.sae.training import decoder, loop
from babelscope.sae.training.schedule import BETAS
from babelscope.sae.training.step import Selection, sparse_step

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # looked at when Triton is imported
    sys.path.append(str(Path(__file__).parent.parent / ".bench" / "triton"))  # `make test` puts it there
pytest.importorskip("triton")

from babelscope.sae.kernels import triton_kernels as kernels  # noqa: E402


@pytest.fixture(autouse=True)
def _used_in_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("training.step", "kernels.topk", "training.decoder"):
        monkeypatch.setattr(f"babelscope.sae.{module}.fused", lambda _: kernels)
    monkeypatch.setattr("babelscope.sae.kernels.topk._suits_groups", lambda *_: False)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("latents", "k", "shift"), [(100, 8, 0.0), (512, 8, -2.5), (512, 8, -99.0), (1999, 33, 0.0)])
def test_top_k_finds_the_largest_scores(latents: int, k: int, shift: float, dtype: torch.dtype) -> None:
    scores = (random(4, latents) + shift).to(dtype)  # in bfloat16 many are equal
    assert kernels.suits_top_k(scores, k)
    indices = kernels.top_k(scores, k)
    assert all(len(set(row)) == k and min(row) >= 0 and max(row) < latents for row in indices.tolist())
    found = scores.gather(1, indices).sort(descending=True).values
    assert torch.equal(found, scores.topk(k).values)


def test_what_top_k_leaves_to_pytorch() -> None:
    assert not kernels.suits_top_k(random(4, 40), 40)  # fewer groups than k
    assert not kernels.suits_top_k(random(4, 512).half(), 8)
    assert not kernels.suits_top_k(random(512, 4).T, 1)


@pytest.mark.parametrize("d", [20, 256, 700])
def test_the_bits_of_a_dot_product_depend_on_its_rows_only(d: int) -> None:
    a, b = random(7, d), random(30, d, seed=1)
    i, j = (torch.arange(210, device=DEVICE).div(n, rounding_mode="floor") % m for n, m in ((30, 7), (1, 30)))
    found = kernels.dots(a, b, i, j)
    torch.testing.assert_close(found, (a[i].double() * b[j]).sum(1).float(), rtol=1e-5, atol=1e-5)
    some = torch.tensor([200, 3, 77, 3], device=DEVICE)
    assert torch.equal(kernels.dots(a, b, i[some], j[some]), found[some])
    assert kernels.dots(a, b, i[:0], j[:0]).shape == (0,)


def test_screening_finds_the_same_as_all_float32_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("babelscope.sae.kernels.dots.fused", lambda _: kernels)
    x, encoder, b_enc = random(4, 48), random(256, 48, seed=1), 0.1 * random(256, seed=2)
    encoder[128:] = encoder[:128] + 1e-6 * random(128, 48, seed=3)  # near ties
    results = [ExactTopK(encoder, b_enc, 3, dtype)(x) for dtype in (torch.bfloat16, torch.float32)]
    row, latent = (torch.arange(4 * 256, device=DEVICE).div(256, rounding_mode="floor"),
                   torch.arange(4 * 256, device=DEVICE) % 256)  # fmt: skip
    scores = kernels.dots(x, encoder, row, latent).view(4, 256) + b_enc
    for values, indices in results:
        assert torch.equal(values, scores.topk(3).values)
        assert torch.equal(scores.gather(1, indices), values)
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize(("d", "q", "k"), [(20, 5, 5), (300, 40, 32)])
def test_candidates_are_ranked_by_exact_scores(d: int, q: int, k: int) -> None:
    centred, encoder, b_enc = random(6, d), random(50, d, seed=1), random(50, seed=2)
    encoder[7] = encoder[3]  # a tie
    b_enc[7] = b_enc[3]
    generator = torch.Generator().manual_seed(3)
    candidates = torch.stack([torch.randperm(50, generator=generator)[:q] for _ in range(6)]).to(DEVICE)
    values, indices = kernels.rerank(centred, encoder, b_enc, candidates, k)
    exact = (centred.double() @ encoder.T.double() + b_enc).gather(1, candidates)
    expected = exact.topk(k)
    torch.testing.assert_close(values.double(), expected.values.relu(), rtol=1e-5, atol=1e-5)
    assert all(len(set(row)) == k for row in indices.tolist())
    found = (centred.double() @ encoder.T.double() + b_enc).gather(1, indices)
    torch.testing.assert_close(found, expected.values, rtol=1e-5, atol=1e-5)


def test_bags_of_any_size_are_decoded() -> None:
    W_dec, counts = random(30, 20), torch.tensor([3, 0, 19, 1, 0], device=DEVICE)
    latent = torch.randint(30, (23,), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    value = random(23, seed=1)
    bag = torch.arange(5, device=DEVICE).repeat_interleave(counts)
    expected = W_dec.new_zeros(5, 20).index_add_(0, bag, value[:, None] * W_dec[latent])
    found = kernels.decode(W_dec, latent, value, counts.cumsum(0) - counts)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_gradients_of_latents_that_never_fire_and_of_those_that_fire_all_over() -> None:
    n, d, d_in, rows = 30, 20, 24, 400
    W_dec, g, centred = random(n, d), random(rows, d, seed=1), random(rows, d_in, seed=2)
    generator = torch.Generator().manual_seed(3)
    several = torch.randint(3, n, (150,), generator=generator)
    latent = torch.cat([torch.zeros(200, dtype=torch.int64), several, torch.full((64,), 7)]).sort().values.to(DEVICE)
    value = torch.rand(len(latent), generator=generator).to(DEVICE)
    bag, row = (torch.randint(rows, (len(latent),), generator=generator).to(DEVICE) for _ in range(2))
    value[5] = 0.0
    encoder, decoder, bias = kernels.gradients(W_dec, g, centred, latent, value, row, bag)
    slope = (W_dec[latent] * g[bag]).sum(1).double() * (value > 0)
    expected = W_dec.new_zeros(n, d).double().index_add_(0, latent, (value[:, None] * g[bag]).double())
    torch.testing.assert_close(decoder.double(), expected, rtol=1e-5, atol=1e-5)
    expected = W_dec.new_zeros(n, d_in).double().index_add_(0, latent, slope[:, None] * centred[row])
    torch.testing.assert_close(encoder.double(), expected, rtol=1e-5, atol=1e-4)
    expected = W_dec.new_zeros(n).double().index_add_(0, latent, slope)
    torch.testing.assert_close(bias.double(), expected, rtol=1e-5, atol=1e-4)
    again = kernels.gradients(W_dec, g, centred, latent, value, row, bag)
    assert all(torch.equal(*pair) for pair in zip((encoder, decoder, bias), again, strict=True))


def test_rows_of_the_decoder() -> None:
    weight, gradient = random(9, 20), random(9, 20, seed=1)
    kernels.normalise_(weight)
    torch.testing.assert_close(weight.norm(dim=1), weight.new_ones(9))
    expected = gradient - (gradient * weight).sum(1, keepdim=True) * weight
    kernels.take_off_parallel_(gradient, weight)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("screen", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("latents", "k", "shift"), [(130, 4, 0.0), (130, 4, -1.2), (130, 4, -99.0), (40, 40, 0.0)])
def test_the_step_has_the_gradients_of_dense_autograd(latents: int, k: int, shift: float, screen: torch.dtype) -> None:
    sae, x = example(latents, k, rows=20)
    with torch.no_grad():
        sae.b_enc.add_(shift)
    loss, gradients, _ = dense(sae, x)
    step = sparse_step(sae.to(DEVICE), x.to(DEVICE), screen=screen)
    step.loss.backward()
    torch.testing.assert_close(step.loss.double().cpu(), loss, rtol=1e-5, atol=0)
    for name, expected in zip(WEIGHTS, gradients, strict=True):
        found = getattr(sae, name).grad.double().cpu()
        assert (found - expected).norm() <= 1e-5 * expected.norm(), name


@pytest.mark.parametrize(("select", "widths"), [("batchtopk", ()), ("topk", (30, 70))])
def test_other_steps_are_as_without_the_kernels(
    select: Selection, widths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def gradients() -> list[Any]:
        sae, x = example(130, 4, rows=20)
        step = sparse_step(sae.to(DEVICE), x.to(DEVICE), select=select, widths=widths, screen=torch.float32)
        step.loss.backward()
        return [step.loss.detach(), *(getattr(sae, name).grad for name in WEIGHTS)]

    found = gradients()
    for module in ("training.step", "kernels.topk"):
        monkeypatch.setattr(f"babelscope.sae.{module}.fused", lambda _: None)
    for a, b in zip(found, gradients(), strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


class Update:
    """A decoder and its optimizer, with and without the kernel that updates it in one pass."""

    def __init__(self, W_dec: torch.Tensor, state: dict[str, Any] | None = None) -> None:
        self.W_dec = torch.nn.Parameter(W_dec.clone())
        self.optimizer = torch.optim.AdamW([self.W_dec], lr=0.01, betas=BETAS, weight_decay=0.0, fused=True)
        if state is not None:
            self.optimizer.load_state_dict(state)

    def __call__(self, gradient: torch.Tensor, rate: float, in_one_pass: bool) -> "Update":
        self.optimizer.param_groups[0]["lr"], self.W_dec.grad = rate, gradient.clone()
        with torch.no_grad():
            if in_one_pass:
                assert decoder.update_(self.W_dec, self.optimizer) and self.W_dec.grad is None
                self.optimizer.step()
            else:  # without any kernel
                self.W_dec.grad -= (gradient * self.W_dec).sum(1, keepdim=True) * self.W_dec
                self.optimizer.step()
                self.W_dec /= self.W_dec.norm(dim=1, keepdim=True)
        return self

    def close_to(self, other: "Update") -> None:
        """Float32 rounds to 6e-8, which the order of a sum of d products and ten steps multiply by about ten.

        A row's error is compared with the norm of the row, so that rows of small gradients count as much as others.
        """
        ours, theirs = (update.optimizer.state_dict() for update in (self, other))
        assert ours["param_groups"] == theirs["param_groups"] and ours["state"].keys() == theirs["state"].keys()
        ours, theirs = ({"W_dec": u.W_dec.detach(), **s["state"][0]} for u, s in ((self, ours), (other, theirs)))
        assert torch.equal(ours.pop("step"), theirs.pop("step")) and sorted(ours) == ["W_dec", "exp_avg", "exp_avg_sq"]
        for name, expected in theirs.items():
            assert ours[name].dtype == expected.dtype
            assert ((ours[name] - expected).norm(dim=1) <= 2e-6 * expected.norm(dim=1)).all(), name


def gradients(d: int) -> list[torch.Tensor]:
    """Of ten steps and eight rows: of norm about sqrt(d), below Adam's epsilon, zero, and usual ones."""
    scale = torch.tensor([1.0, 1e-8, 0.0, 1e-3, 1.0, 0.0, 1e-5, 1e3], device=DEVICE)[:, None]
    return [scale * random(8, d, seed=seed) for seed in range(1, 11)]


def rows(d: int) -> torch.Tensor:
    """Eight rows of norm 1, but for one of zeros and one of about 1e-15."""
    W_dec = torch.nn.functional.normalize(random(8, d))
    return W_dec * torch.tensor([1, 1, 1, 1, 0, 1e-15, 1, 1], device=DEVICE)[:, None]


@pytest.mark.parametrize("d", [20, 33, 256, 701])
def test_the_decoder_is_updated_in_one_pass_as_in_three(d: int) -> None:
    plain, one_pass = Update(rows(d)), Update(rows(d))
    for number, gradient in enumerate(gradients(d)):
        rate = 0.01 * (number + 1) / 10
        one_pass(gradient, rate, True).close_to(plain(gradient, rate, False))
    torch.testing.assert_close(one_pass.W_dec.norm(dim=1).detach(), torch.ones(8, device=DEVICE))


@pytest.mark.parametrize(("before", "after"), [(False, True), (True, False), (True, True)])
def test_either_update_goes_on_with_the_state_of_the_other(before: bool, after: bool) -> None:
    whole, first = Update(rows(20)), Update(rows(20))
    for gradient in gradients(20)[:3]:
        whole(gradient, 0.01, False)
        first(gradient, 0.01, before)
    second = Update(first.W_dec.detach(), first.optimizer.state_dict())
    for gradient in gradients(20)[3:6]:
        second(gradient, 0.01, after).close_to(whole(gradient, 0.01, False))


@pytest.mark.parametrize("changes", [{}, {"frozen": "decoder"}], ids=str)
def test_a_training_goes_on_in_one_pass_from_a_checkpoint_of_three(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop_at_6(step: int, _: object) -> None:
        if step == 6:
            raise KeyboardInterrupt

    settings = training.SETTINGS.model_copy(
        update={"tokens": 64 * 12, "log_every": 3, "dead_after": 128, "latents": 64, **changes}
    )
    monkeypatch.setattr(loop, "_APART", 0)  # a checkpoint after every step
    if DEVICE.type == "cuda":
        hardware = training.HARDWARE.model_copy(update={"accelerator": "gpu"})
        monkeypatch.setattr(training, "HARDWARE", hardware)
    else:  # the interpreter takes long
        for module in ("training.step", "kernels.topk"):
            monkeypatch.setattr(f"babelscope.sae.{module}.fused", lambda _: None)
    monkeypatch.setattr("babelscope.sae.training.decoder.fused", lambda _: None)
    *_, whole = training.run(tmp_path / "whole", settings)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        training.run(tmp_path / "killed", settings, write=stop_at_6)
    monkeypatch.setattr("babelscope.sae.training.decoder.fused", lambda _: kernels)
    called = []
    update = kernels.update_rows_
    monkeypatch.setattr(kernels, "update_rows_", lambda *some: (called.append(len(some[0])), update(*some)))
    decoder._agrees.cache_clear()
    _, history, resumed = training.run(tmp_path / "killed", settings)
    assert history[-1]["step"] == 12 and called == [decoder._ROWS] + 7 * [64]  # the checkpoint of step 5 was used
    for a, b in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


COMPILE = """
import re
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from babelscope.sae.kernels.triton_kernels import _update_rows as kernel
names = kernel.arg_names
types = dict.fromkeys(names[:5], "*fp32") | dict.fromkeys(names[5:-2], "fp32") | dict.fromkeys(names[-2:], "constexpr")
aligned = {(number,): [["tt.divisibility", 16]] for number in range(5)}
source = ASTSource(kernel, types, {"D": 2048, "BLOCK": 2048}, aligned)
ptx = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"]
print(*(len(re.findall(rf"{name}.global[^\\n]*v4.b32", ptx)) for name in ("ld", "st")))
"""


@pytest.mark.skipif(DEVICE.type == "cuda", reason="there the kernel runs")
def test_the_kernel_compiles_for_a_gpu_and_moves_28_bytes_per_weight(tmp_path: Path) -> None:
    path = os.pathsep.join(path for path in sys.path if path)
    environment = os.environ | {"PYTHONPATH": path, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    # Each of 128 threads has 16 of the 2,048 numbers of a row, four to an instruction: 4 rows are read, 3 are written.
    assert done.stdout.split() == ["16", "12"], done.stderr


def fail(*_: object) -> None:
    raise RuntimeError("out of registers")


def with_less_epsilon(*some: Any, update: Any = kernels.update_rows_) -> None:
    update(*some[:-1], 0.5e-8)


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [(fail, "out of registers"), (lambda *_: None, "results differ"), (with_less_epsilon, "results differ")],
)
def test_a_kernel_that_fails_or_differs_is_not_used(
    kernel: Any, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    monkeypatch.setattr(kernels, "update_rows_", kernel)
    decoder._agrees.cache_clear()
    update = Update(rows(20))
    update.W_dec.grad = random(8, 20)
    assert not decoder.update_(update.W_dec, update.optimizer)
    assert torch.equal(update.W_dec, rows(20)) and torch.equal(update.W_dec.grad, random(8, 20))
    assert reason in caplog.text
    decoder._agrees.cache_clear()
