import pytest
import torch

from babelscope.sae.autoencoder import SAE, initialise
from babelscope.sae.training.step import sparse_step

WEIGHTS = ("encoder", "W_dec", "b_enc", "b_dec")


def example(latents: int, k: int, d: int = 24, rows: int = 200, seed: int = 0) -> tuple[SAE, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sae = initialise(torch.randn(d, generator=generator), latents, k, encoder_scale=0.5, seed=seed)
    with torch.no_grad():
        sae.b_enc.copy_(0.1 * torch.randn(latents, generator=generator))
    return sae, torch.randn(rows, d, generator=generator)


def dense(sae: SAE, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """Loss, gradients and indices by plain autograd in double precision, with everything kept."""
    encoder, W_dec, b_enc, b_dec = (getattr(sae, name).detach().double().requires_grad_() for name in WEIGHTS)
    scores = ((x.double() - b_dec) @ encoder.T + b_enc).relu()
    values, indices = scores.topk(sae.k, dim=-1)
    z = torch.zeros_like(scores).scatter(1, indices, values)
    loss = (z @ W_dec + b_dec - x.double()).square().sum() / len(x)
    return loss, list(torch.autograd.grad(loss, (encoder, W_dec, b_enc, b_dec))), indices


@pytest.mark.parametrize("screen", [torch.bfloat16, torch.float32, None])
@pytest.mark.parametrize(
    ("latents", "k", "shift"),
    [
        (512, 8, 0.0),  # the top-k by groups
        (100, 8, 0.0),  # the plain top-k
        (512, 8, -1.2),  # rows with fewer than k positive scores, many latents that never fire
        (512, 8, -99.0),  # nothing fires at all
        (40, 40, 0.0),  # every positive latent is active
    ],
)
def test_gradients_are_those_of_dense_autograd(latents: int, k: int, shift: float, screen: torch.dtype | None) -> None:
    sae, x = example(latents, k)
    with torch.no_grad():
        sae.b_enc.add_(shift)
    loss, gradients, _ = dense(sae, x)
    step = sparse_step(sae, x, screen=screen)
    (3.0 * step.loss).backward()
    torch.testing.assert_close(step.loss.double(), loss, rtol=1e-5, atol=0)
    for name, expected in zip(WEIGHTS, gradients, strict=True):
        found = getattr(sae, name).grad
        assert found.dtype == torch.float32
        assert (found.double() - 3.0 * expected).norm() <= 1e-5 * 3.0 * expected.norm(), name


def test_equal_latents_share_one_hit_set_without_loss_of_gradient() -> None:
    """Two copies of every latent tie exactly: whichever is taken, the pair's gradients add up to the same."""
    sae, x = example(256, 8)
    with torch.no_grad():
        for name in ("encoder", "W_dec", "b_enc"):
            weight = getattr(sae, name)
            weight[128:] = weight[:128]
    sae.k = 16  # even: pairs are taken whole
    loss, gradients, _ = dense(sae, x)
    sparse_step(sae, x).loss.backward()
    for name, expected in zip(WEIGHTS, gradients, strict=True):
        found = getattr(sae, name).grad.double()
        if name != "b_dec":
            found, expected = (g[:128] + g[128:] for g in (found, expected))
        assert (found - expected).norm() <= 1e-5 * expected.norm(), name


def test_screening_in_bfloat16_finds_the_exact_top_k() -> None:
    sae, x = example(2048, 32, d=64, rows=1000)
    *_, indices = dense(sae, x)
    step = sparse_step(sae, x, screen=torch.bfloat16)
    values, _ = sae.encode(x)
    exact = torch.zeros(2048).index_add_(0, indices.view(-1), torch.ones(indices.numel()))
    assert torch.equal(step.activity > 0, exact > 0)
    torch.testing.assert_close(step.activity.sum().float(), values.sum(), rtol=1e-5, atol=0)
    torch.testing.assert_close(step.min_activation, values[values > 0].min(), rtol=1e-4, atol=0)


def test_what_a_step_tells_is_what_the_sae_itself_gives() -> None:
    sae, x = example(512, 8)
    step = sparse_step(sae, x, screen=torch.float32)
    values, indices = sae.encode(x)
    expected = torch.zeros(512).index_add_(0, indices.view(-1), values.view(-1))
    torch.testing.assert_close(step.activity.float(), expected)
    torch.testing.assert_close(step.error, sae.decode(values, indices).detach() - x)
    assert float(step.l0) == pytest.approx(float((values > 0).sum()) / 200)
    assert not step.error.requires_grad


def test_many_chunks_give_what_one_chunk_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    sae, x = example(512, 8)
    whole = sparse_step(sae, x, screen=torch.float32)
    monkeypatch.setattr("babelscope.sae.training.step.chunk_rows", lambda *_: 33)
    parts = sparse_step(sae, x, screen=torch.float32)
    torch.testing.assert_close(parts.loss, whole.loss)
    torch.testing.assert_close(parts.activity, whole.activity)
    assert torch.equal(parts.activity > 0, whole.activity > 0)
