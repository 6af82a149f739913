"""The dense product against double precision, in every case that takes another path."""

from types import SimpleNamespace

import pytest
import torch
import transformers

from babelscope.models import matmul


@pytest.mark.parametrize("shape", [(1, 8), (37, 8), (2, 5, 8), (0, 8)])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_equals_the_product_in_double_precision(shape, with_bias, dtype):
    torch.manual_seed(0)
    x, weight = torch.randn(shape, dtype=dtype), torch.randn(11, 8, dtype=dtype)
    bias = torch.randn(11, dtype=dtype) if with_bias else None
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    found = matmul.linear(x, weight, bias)
    assert found.dtype == dtype and found.shape == expected.shape
    assert torch.allclose(found.double(), expected, atol=0.1 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("fault", ["absent", "other arguments", "other result"])
def test_without_onednns_operator_the_plain_product_gives_the_same(fault, monkeypatch):
    x, weight, bias = torch.randn(37, 64), torch.randn(11, 64), torch.randn(11)
    usual = matmul.linear(x, weight, bias)

    def other(x, weight, bias, *rest):
        if fault == "other arguments":
            raise RuntimeError("expected at most 3 arguments")
        return torch.zeros(len(x), len(weight))

    ops = SimpleNamespace() if fault == "absent" else SimpleNamespace(_linear_pointwise=other)
    monkeypatch.setattr(torch.ops, "mkldnn", ops)
    matmul._onednn.cache_clear()
    try:
        assert matmul._onednn() is None
        found = matmul.linear(x, weight, bias)
    finally:
        matmul._onednn.cache_clear()
    assert torch.equal(found, torch.nn.functional.linear(x, weight, bias))
    assert torch.allclose(found, usual, rtol=0, atol=64 * torch.finfo().eps)


def test_gradients_still_flow():
    x, weight = torch.randn(4, 8), torch.randn(3, 8, requires_grad=True)
    matmul.linear(x, weight).sum().backward()
    assert torch.allclose(weight.grad, x.sum(0).expand(3, 8), atol=1e-6)


def test_a_model_computes_the_same():
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    ids = torch.randint(0, 50, (3, 7))
    before = model(input_ids=ids).logits
    matmul.use_in(model)
    assert torch.allclose(model(input_ids=ids).logits, before, atol=1e-5)


def test_filled_up_with_the_last_row_to_one_of_few_sizes():
    expected = {0: 0, 1: 1, 2: 2, 3: 4, 5: 8, 33: 64, 64: 64, 65: 128, 128: 128, 129: 192, 1000: 1024}
    for rows, size in expected.items():
        x = torch.arange(2 * rows).view(rows, 2)
        found = matmul.pad_rows(x)
        assert found.shape == (size, 2) and found.dtype == x.dtype
        assert torch.equal(found[:rows], x) and all(torch.equal(row, x[-1]) for row in found[rows:])
    assert [len(matmul.pad_rows(torch.ones(rows), 128)) for rows in (3, 65, 128, 129)] == [4, 128, 128, 256]
