"""The training steps of all activation functions against plain autograd in double precision."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from babelscope.sae.autoencoder import SAE, initialise
from babelscope.sae.training.dense import _BANDWIDTH, dense_step
from babelscope.sae.training.step import sparse_step

WEIGHTS = ("encoder", "W_dec", "b_enc", "b_dec")
ROWS, D, N, K = 200, 24, 512, 8


def example(transcoder: bool = False) -> tuple[SAE, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    b_in = torch.randn(16, generator=generator) if transcoder else None
    sae = initialise(torch.randn(D, generator=generator), N, K, encoder_scale=0.5, seed=0, b_in=b_in)
    with torch.no_grad():
        sae.b_enc.copy_(0.1 * torch.randn(N, generator=generator))
    x = torch.randn(ROWS, sae.d_in, generator=generator)
    x *= torch.linspace(0.2, 3.0, ROWS).unsqueeze(1)  # rows that deserve few and rows that deserve many latents
    return sae, x, torch.randn(ROWS, D, generator=generator) if transcoder else None


def doubles(sae: SAE) -> list[Tensor]:
    return [getattr(sae, name).detach().double().requires_grad_() for name in WEIGHTS]


def scores_of(sae: SAE, x: Tensor, encoder: Tensor, b_enc: Tensor, b_dec: Tensor) -> Tensor:
    return (x.double() - (b_dec if sae.b_in is None else sae.b_in.double())) @ encoder.T + b_enc


def reference(
    sae: SAE, x: Tensor, y: Tensor | None, select: str, widths: Sequence[int]
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Loss, gradients and dense activations with everything kept."""
    encoder, W_dec, b_enc, b_dec = weights = doubles(sae)
    scores = scores_of(sae, x, encoder, b_enc, b_dec).relu()
    if select == "topk":
        z = torch.zeros_like(scores).scatter(1, *reversed(scores.topk(K)))
    else:
        z = scores.where(scores >= scores.flatten().topk(ROWS * K).values[-1], 0.0)
    target = (x if y is None else y).double()
    errors = [z[:, :m] @ W_dec[:m] + b_dec - target for m in (*widths, N)]
    loss = torch.stack([error.square().sum() / len(x) for error in errors]).mean()
    return loss, list(torch.autograd.grad(loss, weights)), z.detach()


@pytest.mark.parametrize("screen", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("transcoder", [False, True])
@pytest.mark.parametrize("widths", [(), (64, 200)])
@pytest.mark.parametrize("select", ["topk", "batchtopk"])
def test_sparse_gradients_are_those_of_autograd(
    select: str, widths: tuple[int, ...], transcoder: bool, screen: torch.dtype
) -> None:
    sae, x, y = example(transcoder)
    loss, gradients, z = reference(sae, x, y, select, widths)
    step = sparse_step(sae, x, y, select=select, widths=widths, screen=screen)  # type: ignore[arg-type]
    step.loss.backward()
    torch.testing.assert_close(step.loss.double(), loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(step.activity.double(), z.sum(0), rtol=1e-4, atol=1e-4)
    assert float(step.l0) == pytest.approx(float((z > 0).sum()) / ROWS)
    torch.testing.assert_close(step.min_activation.double(), z[z > 0].min(), rtol=1e-4, atol=0)
    for name, expected in zip(WEIGHTS, gradients, strict=True):
        found = getattr(sae, name).grad
        assert (found.double() - expected).norm() <= 1e-5 * expected.norm(), name


def test_rows_may_have_more_latents_than_batchtopk_looks_at_first() -> None:
    sae, x, _ = example()
    x[0] *= 100  # this row takes far more than three times k
    _, gradients, z = reference(sae, x, None, "batchtopk", ())
    assert (z[0] > 0).sum() > 12 * K
    step = sparse_step(sae, x, select="batchtopk")
    step.loss.backward()
    assert float(step.l0) == K
    for name, expected in zip(WEIGHTS, gradients, strict=True):
        assert (getattr(sae, name).grad.double() - expected).norm() <= 1e-5 * expected.norm(), name


@pytest.mark.parametrize("select", ["topk", "batchtopk"])
@pytest.mark.parametrize("widths", [(), (64, 200)])
def test_a_batch_on_which_nothing_fires(select: str, widths: tuple[int, ...]) -> None:
    sae, x, _ = example()
    with torch.no_grad():
        sae.b_enc.fill_(-1e4)
    step = sparse_step(sae, x, select=select, widths=widths)  # type: ignore[arg-type]
    step.loss.backward()
    assert (float(step.l0), float(step.min_activation)) == (0.0, torch.inf)
    assert sae.encoder.grad is not None and not sae.encoder.grad.any()
    expected = 2 * (sae.b_dec - x).mean(0)
    assert sae.b_dec.grad is not None
    torch.testing.assert_close(sae.b_dec.grad, expected)


@pytest.mark.parametrize("transcoder", [False, True])
@pytest.mark.parametrize("chunk", [33, 4096])
def test_relu_with_l1(transcoder: bool, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("babelscope.sae.training.dense.chunk_rows", lambda *_: chunk)
    sae, x, y = example(transcoder)
    encoder, W_dec, b_enc, b_dec = weights = doubles(sae)
    z = scores_of(sae, x, encoder, b_enc, b_dec).relu()
    error = z @ W_dec + b_dec - (x if y is None else y).double()
    loss = (error.square().sum() + 0.7 * z.sum()) / ROWS
    gradients = torch.autograd.grad(loss, weights)
    step = dense_step(sae, x, y, sparsity=torch.tensor(0.7))
    (2.0 * step.loss).backward()
    torch.testing.assert_close(step.loss.double(), loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(step.error.double(), error.detach(), rtol=1e-4, atol=1e-4)
    assert float(step.l0) == pytest.approx(float((z > 0).sum()) / ROWS)
    for name, expected in zip(WEIGHTS, gradients, strict=True):
        assert (getattr(sae, name).grad.double() - 2.0 * expected).norm() <= 1e-5 * 2.0 * expected.norm(), name


@pytest.mark.parametrize("chunk", [33, 4096])
def test_jumprelu_and_its_pseudo_derivatives(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rajamanoharan et al. 2024, eq. 11 and 12, written out for every score near its threshold."""
    monkeypatch.setattr("babelscope.sae.training.dense.chunk_rows", lambda *_: chunk)
    sae, x, _ = example()
    log_threshold = torch.linspace(-2, 0.5, N).requires_grad_()
    theta = log_threshold.detach().double().exp()
    encoder, W_dec, b_enc, b_dec = weights = doubles(sae)
    scores = scores_of(sae, x, encoder, b_enc, b_dec)
    on = (scores > theta).double()
    z = scores * on  # the derivative of a step function is 0 for autograd, as it is to be for the scores
    error = z @ W_dec + b_dec - x.double()
    loss = (error.square().sum() + 0.3 * on.sum()) / ROWS
    gradients = torch.autograd.grad(loss, weights)
    grad_z = 2 * error.detach() @ W_dec.detach().T / ROWS
    near = ((scores - theta).abs() < _BANDWIDTH / 2).double() / _BANDWIDTH
    grad_theta = -((theta * grad_z + 0.3 / ROWS) * near).sum(0)

    step = dense_step(sae, x, log_threshold=log_threshold, sparsity=torch.tensor(0.3))
    step.loss.backward()
    torch.testing.assert_close(step.loss.double(), loss.detach(), rtol=1e-5, atol=0)
    for name, expected in zip(WEIGHTS, gradients, strict=True):
        assert (getattr(sae, name).grad.double() - expected).norm() <= 1e-5 * expected.norm(), name
    assert log_threshold.grad is not None and near.any()
    expected = grad_theta * theta  # by the chain rule of the logarithm
    assert (log_threshold.grad.double() - expected).norm() <= 1e-4 * expected.norm()


def test_jumprelu_by_hand() -> None:
    eye = torch.eye(2)
    sae = SAE(eye, 2 * eye, torch.zeros(2), torch.zeros(2), threshold=torch.tensor([1.0, 0.0]))
    x = torch.tensor([[1.5, 0.5], [1.0, -1.0], [0.5, 3.0]])
    values, indices = sae.encode(x)
    assert values.tolist() == [[1.5, 0.5], [0.0, 0.0], [3.0, 0.0]]
    assert indices[0].tolist() == [0, 1] and indices[2, 0] == 1
    assert sae(x).tolist() == [[3.0, 1.0], [0.0, 0.0], [0.0, 6.0]]


@pytest.mark.parametrize("threshold", [torch.zeros(N), torch.full((N,), 0.4)])
def test_jumprelu_in_chunks_of_different_sparsity(threshold: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("babelscope.sae.autoencoder.chunk_rows", lambda *_: 7)
    topk, x, _ = example()
    sae = SAE(topk.encoder, topk.W_dec, topk.b_enc, topk.b_dec, threshold=threshold)
    scores = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    z = scores.where((scores > threshold) & (scores > 0), 0.0)
    values, indices = sae.encode(x.view(10, 20, D))
    assert values.shape[:2] == (10, 20) and values.shape[2] == int((z > 0).sum(1).max())
    dense = torch.zeros(ROWS, N).scatter_add_(1, indices.flatten(0, 1), values.flatten(0, 1))
    torch.testing.assert_close(dense, z)
    torch.testing.assert_close(sae(x), z @ sae.W_dec + sae.b_dec, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either k .* or a threshold"),
        ({"k": 2, "threshold": torch.zeros(4)}, "either k .* or a threshold"),
        ({"threshold": torch.zeros(3)}, "4 thresholds"),
        ({"threshold": -torch.ones(4)}, ">= 0"),
        ({"k": 2, "b_in": torch.zeros(5)}, "b_in"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SAE(torch.zeros(4, 3), torch.zeros(4, 3), torch.zeros(4), torch.zeros(3), **arguments)  # type: ignore[arg-type]
