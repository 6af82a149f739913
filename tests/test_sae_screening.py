"""Screening in bfloat16 gives the bits of the comparison of all float32 scores, on near ties, too."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from babelscope.models import compat
from babelscope.sae import screening
from babelscope.sae.autoencoder import SAE, initialise
from babelscope.sae.kernels.dots import aligned, fixed_dots
from babelscope.sae.screening import ExactTopK, suits

DTYPES = (torch.bfloat16, torch.float32)
pytestmark = pytest.mark.skipif(compat.gathered_dots() is None, reason="PyTorch lacks the kernel of exact scores")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def all_scores(x: Tensor, encoder: Tensor, b_enc: Tensor) -> Tensor:
    rows, n = len(x), len(encoder)
    return (
        fixed_dots(x, encoder, torch.arange(rows).repeat_interleave(n), torch.arange(n).repeat(rows)).view(rows, n)
        + b_enc
    )


def check(x: Tensor, encoder: Tensor, b_enc: Tensor, k: int) -> list[int]:
    """Both dtypes give the k largest float32 scores, of equal ones the lowest index; returns the rows done again."""
    exact = all_scores(x, encoder, b_enc).relu()
    order = exact.sort(dim=1, descending=True, stable=True)
    redone = []
    for dtype in DTYPES:
        choose = ExactTopK(encoder, b_enc, k, dtype)
        values, indices = choose(x)
        assert torch.equal(values, order.values[:, :k])
        fires = values > 0
        assert torch.equal(indices[fires], order.indices[:, :k][fires])
        redone.append(choose.redone)
    return redone


@pytest.mark.parametrize(("n", "d", "k"), [(4096, 64, 8), (2048, 16, 1), (512, 32, 512), (1008, 48, 20)])
def test_random_rows(n: int, d: int, k: int) -> None:
    check(random(50, d), random(n, d, seed=1), 0.1 * random(n, seed=2), k)


def test_most_rows_need_one_pass_only() -> None:
    redone = check(random(300, 256), random(8192, 256, seed=1), torch.zeros(8192), 8)
    assert redone[0] <= 15
    assert redone[1] == 0


@settings(max_examples=40, deadline=None)
@given(
    size=st.sampled_from([0.0, 1e-7, 1e-5, 1e-3]),
    copies=st.sampled_from([2, 64, 512]),
    shift=st.sampled_from([0.0, -3.0, -100.0, 1000.0]),
    peak=st.sampled_from([1.0, 1e4]),
    scale=st.sampled_from([1.0, 1e-25, 1e15]),
    k=st.integers(1, 12),
    seed=st.integers(0, 10**6),
)
def test_near_ties(size: float, copies: int, shift: float, peak: float, scale: float, k: int, seed: int) -> None:
    """Latents in groups of almost equal ones, biases that leave few or no positive scores, a dominating dimension."""
    encoder = random(512 // copies, 32, seed=seed).repeat(copies, 1) + size * random(512, 32, seed=seed + 1)
    x = random(6, 32, seed=seed + 2)
    x[:, 3] *= peak
    x[0] = 0.0
    check(x * scale, encoder, torch.full((512,), shift * scale), k)


def test_rows_that_one_unit_in_the_last_place_decides() -> None:
    """The k-th and every later latent differ in the last bit of one weight: no candidates are enough."""
    encoder = torch.full((1024, 16), 0.5)
    order = torch.randperm(1024, generator=torch.Generator().manual_seed(0))
    encoder[:, 0] = 1 + torch.arange(1024)[order] * 2.0**-23
    redone = check(torch.ones(3, 16), encoder, torch.zeros(1024), 4)
    assert redone == [3, 3]


def test_numbers_too_large_for_a_bound_are_compared_one_by_one() -> None:
    assert check(1e20 * random(2, 16), 1e17 * random(256, 16, seed=1), torch.zeros(256), 3)[0] == 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bound_holds(dtype: torch.dtype) -> None:
    x, encoder, b_enc = random(40, 64), random(512, 64, seed=1) * random(512, 1, seed=3).exp(), random(512, seed=2)
    choose = ExactTopK(encoder, b_enc, 4, dtype)
    scores, bound = choose._screen(x)
    exact = all_scores(x, encoder, b_enc).double()
    last = 2 * screening._LAST[dtype] * scores.double().abs()
    assert ((scores.double() - exact).abs() <= bound + last).all()
    assert (choose._highest(scores, bound) >= exact).all()


def test_a_rows_result_does_not_depend_on_the_other_rows_or_on_its_place_in_memory() -> None:
    x, encoder, b_enc = random(64, 48), random(1024, 48, seed=1), random(1024, seed=2)
    shifted = torch.empty(encoder.numel() + 1)[1:].view_as(encoder).copy_(encoder)
    assert shifted.data_ptr() % 64
    assert torch.equal(aligned(shifted), encoder)
    whole = ExactTopK(encoder, b_enc, 5, torch.bfloat16)(x)
    part = ExactTopK(shifted, b_enc, 5, torch.bfloat16)(torch.empty(17 * 48 + 3)[3:].view(17, 48).copy_(x[7:24]))
    assert all(torch.equal(a[7:24], b) for a, b in zip(whole, part, strict=True))


def example(latents: int = 4096, d: int = 32) -> tuple[SAE, Tensor]:
    return initialise(random(d, seed=9), latents, 8, encoder_scale=0.5, seed=0), random(600, d)


def test_wide_dictionaries_are_screened_and_small_ones_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    sae, x = example()
    assert not sae.is_screened
    dense = sae.encode(x)
    monkeypatch.setattr(screening, "_WEIGHTS", 2**16)
    assert sae.is_screened
    values, indices = sae.encode(x)
    torch.testing.assert_close(values, dense[0].sort(descending=True).values, rtol=1e-5, atol=1e-5)
    rows = [sae.encode(row.unsqueeze(0)) for row in x[:20]]
    fresh, _ = example()
    rows += [fresh.encode(row.unsqueeze(0)) for row in x[:20]]  # these screen in float32
    assert set(fresh._screens) == {torch.float32}
    for number, (value, index) in enumerate(rows):
        assert torch.equal(value[0], values[number % 20])
        assert torch.equal(index[0], indices[number % 20])
    assert not suits(torch.empty(2048, 40), 16)  # too few latents per active one
    assert not suits(torch.empty(4096, 40), 8)  # rows of 40 numbers do not all begin at multiples of 64 bytes


def test_changed_weights_are_screened_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screening, "_WEIGHTS", 2**16)
    sae, x = example()
    before = sae.encode(x)
    with torch.no_grad():
        sae.encoder.mul_(2)
    torch.testing.assert_close(sae.encode(x)[0], 2 * before[0])
    sae.encoder = torch.nn.Parameter(sae.encoder.detach() / 2)
    assert torch.equal(sae.encode(x)[0], before[0])
    sae.k = 3
    assert torch.equal(sae.encode(x)[0], before[0][:, :3])
