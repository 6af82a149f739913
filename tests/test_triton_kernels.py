"""The CUDA path's kernels against PyTorch's own operations: on a GPU, elsewhere in Triton's interpreter."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_sae_step import WEIGHTS, dense, example

from babelscope.sae.screening import ExactTopK
from babelscope.sae.training.step import Selection, sparse_step

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # looked at when Triton is imported
    sys.path.append(str(Path(__file__).parent.parent / ".bench" / "triton"))  # `make test` puts it there
pytest.importorskip("triton")

from babelscope.sae.kernels import triton_kernels as kernels  # noqa: E402


@pytest.fixture(autouse=True)
def _used_in_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("training.step", "kernels.topk", "training.learner"):
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
