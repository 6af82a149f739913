import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from babelscope.sae.kernels.topk import top_k


def check(scores: torch.Tensor, k: int) -> None:
    values, indices = top_k(scores, k)
    expected = scores.float().topk(k, dim=-1).values.relu()
    assert values.dtype == scores.dtype
    assert indices.dtype == torch.int64
    assert torch.equal(values.float().sort(dim=1, descending=True).values, expected)
    assert torch.equal(scores.gather(1, indices).relu(), values)
    assert all(len(set(row)) == k for row in indices.tolist())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("latents", "k"), [(4608, 40), (4608, 1), (640, 20), (96, 6), (100, 7), (64, 64), (33, 3)])
def test_the_values_are_those_of_torch_topk(latents: int, k: int, dtype: torch.dtype) -> None:
    check(torch.randn(50, latents, generator=torch.Generator().manual_seed(k)).to(dtype), k)


@settings(max_examples=60, deadline=None)
@given(
    levels=st.integers(1, 6),
    shift=st.integers(-6, 6),
    k=st.integers(1, 8),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    seed=st.integers(0, 10**6),
)
def test_ties_zeros_and_negative_rows(levels: int, shift: int, k: int, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = (torch.randint(0, levels, (5, 256), generator=generator) + shift).to(dtype)
    scores[0] = -1.0
    scores[1] = -0.0
    check(scores, k)


def test_all_winners_in_one_group_and_at_both_ends() -> None:
    scores = torch.full((3, 512), -1.0)
    scores[0, 48:64] = torch.arange(1.0, 17.0)
    scores[1, [0, 511]] = torch.tensor([3.0, 2.0])
    scores[2, 511] = float("inf")
    values, indices = top_k(scores, 16)
    assert sorted(indices[0].tolist()) == list(range(48, 64))
    assert set(indices[1][values[1] > 0].tolist()) == {0, 511}
    assert indices[2][values[2] > 0].tolist() == [511]


def test_a_slice_that_is_not_contiguous_takes_the_plain_way() -> None:
    check(torch.randn(4, 1024, generator=torch.Generator().manual_seed(0))[:, ::2], 5)
