from types import SimpleNamespace
from typing import Any

import pytest
import torch

from babelscope.sae.autoencoder import SAE, initialise
from babelscope.sae.metrics import quality


def example(latents: int = 512, k: int = 8, d: int = 24) -> SAE:
    return initialise(torch.linspace(-1, 1, d), latents, k, encoder_scale=0.5, seed=0)


def x_of(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def test_a_case_by_hand() -> None:
    encoder = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
    decoder = torch.tensor([[2.0, 0.0], [0.0, 3.0], [5.0, 5.0]])
    sae = SAE(encoder, decoder, torch.tensor([0.0, 0.5, 0.0]), torch.tensor([1.0, 1.0]), k=1)
    values, indices = sae.encode(torch.tensor([[4.0, 2.0], [1.0, 3.0], [0.0, 0.0]]))
    assert values.tolist() == [[3.0], [2.5], [2.0]]
    assert indices.tolist() == [[0], [1], [2]]
    assert sae.decode(values, indices).tolist() == [[7.0, 1.0], [1.0, 8.5], [11.0, 11.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("latents", "k"), [(512, 8), (100, 100), (48, 3)])
def test_encode_is_the_exact_top_k(latents: int, k: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("babelscope.sae.autoencoder.chunk_rows", lambda *_: 7)
    sae, x = example(latents, k), x_of(40, 24).to(dtype)
    scores = ((x.float() - sae.b_dec) @ sae.W_enc + sae.b_enc).relu()
    values, indices = sae.encode(x)
    torch.testing.assert_close(values.sort(descending=True).values, scores.topk(k).values)
    torch.testing.assert_close(scores.gather(1, indices), values)
    dense = torch.zeros_like(scores).scatter(1, indices, values) @ sae.W_dec + sae.b_dec
    torch.testing.assert_close(sae(x), dense)


def test_leading_dimensions_are_kept_and_may_be_empty() -> None:
    sae = example()
    values, indices = sae.encode(x_of(2, 3, 24))
    assert values.shape == indices.shape == (2, 3, 8)
    assert (values.dtype, indices.dtype) == (torch.float32, torch.int64)
    assert sae.decode(values, indices).shape == (2, 3, 24)
    assert sae(x_of(24)).shape == (24,)
    assert sae(x_of(0, 24)).shape == (0, 24)
    assert not values.requires_grad


def test_decode_takes_any_number_of_latents_and_is_differentiable() -> None:
    sae = example()
    values = torch.ones(3, 2, requires_grad=True)
    sae.decode(values, torch.tensor([[0, 1], [2, 3], [4, 5]])).sum().backward()
    assert values.grad is not None
    torch.testing.assert_close(values.grad[1], sae.W_dec.detach()[[2, 3]].sum(1))


def test_initialisation() -> None:
    sae = example()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(512))
    torch.testing.assert_close(sae.W_enc, 0.5 * sae.W_dec.T)
    assert torch.equal(sae.b_dec, torch.linspace(-1, 1, 24))
    assert torch.equal(sae.W_dec, example().W_dec)
    assert sae.W_enc.T.is_contiguous()


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[n, d\]"):
        SAE(torch.zeros(4, 3), torch.zeros(3, 4), torch.zeros(4), torch.zeros(3), 1)
    with pytest.raises(ValueError, match="k = 5"):
        SAE(torch.zeros(4, 3), torch.zeros(4, 3), torch.zeros(4), torch.zeros(3), 5)


def test_quality_is_that_of_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("babelscope.sae.metrics._CHUNK", 33)
    sae, data = example(), x_of(200, 24) + 3.0
    store: Any = SimpleNamespace(d=24, gather=lambda rows: data[rows])
    rows, group = torch.arange(10, 190), torch.arange(180) % 2
    found = quality(sae, store, rows, group, 3)
    x = data[10:190].double()
    error = (sae(data[10:190]).detach().double() - x).square()
    assert found.fvu == pytest.approx(float(error.sum() / (x - x.mean(0)).square().sum()), rel=1e-6)
    for language in (0, 1):
        mine = x[group == language]
        expected = error[group == language].sum() / (mine - mine.mean(0)).square().sum()
        assert found.fvu_of[language] == pytest.approx(float(expected), rel=1e-6)
    assert found.fvu_of[2] != found.fvu_of[2]  # a group without rows has no figure
    values, indices = sae.encode(data[10:190])
    assert found.l0 == pytest.approx(float((values > 0).sum()) / 180)
    assert found.dead_share == pytest.approx(1 - len(indices[values > 0].unique()) / 512)
