"""NLL without logits for the whole vocabulary: against float64, on the hardest rows, in every family."""

import math

import pytest
import torch
import transformers
from test_model_families import FAMILIES, VOCABULARY, make
from torch import nn
from torch.nn import functional as F  # noqa: N812

from babelscope.models import hookpoints, nll

EXTRA = {
    "cohere": ("CohereConfig", {"logit_scale": 0.0625}),
    "granite": ("GraniteConfig", {"logits_scaling": 8.0}),
    "gemma2-capped": ("Gemma2Config", {"head_dim": 8, "final_logit_softcapping": 3.0}),
    "gpt-j": ("GPTJConfig", {"n_embd": 16, "n_layer": 4, "n_head": 2, "rotary_dim": 4}),  # with a bias
}


def other(name: str) -> transformers.PreTrainedModel:
    kind, options = EXTRA[name]
    torch.manual_seed(2)
    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1,
             "intermediate_size": 24, "pad_token_id": 0}  # fmt: skip
    config = getattr(transformers, kind)(vocab_size=VOCABULARY, **({} if kind == "GPTJConfig" else sizes), **options)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    unembedding = model.get_output_embeddings()
    unembedding.weight.mul_(40)
    if unembedding.bias is not None:
        unembedding.bias.normal_()
    return model


@pytest.mark.parametrize("name", [*FAMILIES, *EXTRA])
def test_every_family_is_read_in_chunks_and_gives_what_its_logits_give(name, monkeypatch):
    monkeypatch.setattr(nll, "COLUMNS", 7)
    monkeypatch.setattr(nll, "ROWS", 5)
    model = make(name) if name in FAMILIES else other(name)
    assert nll.head_of(model) is not None
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    mask, target = torch.ones_like(ids), torch.ones((2, 8), dtype=torch.bool)
    target[1, 4:] = False
    logits = model(input_ids=ids, use_cache=False).logits.double()
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(2, 8)
    found = nll.token_nll(model, ids, mask, target)
    assert torch.allclose(found.double(), expected.where(target, 0.0), atol=1e-5)

    stream = torch.randn((13, 16), generator=torch.Generator().manual_seed(1))
    wanted = torch.arange(13) + 3
    expected = F.cross_entropy(hookpoints.logits_of(model, stream).double(), wanted, reduction="none")
    assert torch.allclose(nll.stream_nll(model, stream, wanted).double(), expected, atol=1e-5)

    changed, row = stream[[3, 3, 0, 12, 5, 6, 6]] + stream[:7], torch.tensor([3, 3, 0, 12, 5, 6, 6])
    found = nll.divergence(model, nll.stream_outputs(model, stream), nll.stream_outputs(model, changed), row)
    p, q = (hookpoints.logits_of(model, x).double().log_softmax(1) for x in (stream[row], changed))
    assert torch.allclose(found, (p.exp() * (p - q)).sum(1), rtol=1e-4, atol=1e-6) and found.max() > 0.01


def test_the_divergence_by_hand():
    """p = (1/4, 3/4) and q = (1/2, 1/2): KL = 1/4 log 1/2 + 3/4 log 3/2; of p from itself it is 0."""
    unembedding = nn.Linear(2, 2, bias=False)
    unembedding.weight = nn.Parameter(torch.eye(2), requires_grad=False)
    x, y = torch.tensor([[0.0, 0.0], [0.0, math.log(3)]]), torch.tensor([[5.0, 5.0], [7.0, 7 + math.log(3)]])
    found = nll.Head(unembedding, 1.0, None).divergence(x, y, torch.tensor([1, 1]))
    assert found.tolist() == pytest.approx([math.log(0.5) / 4 + 3 * math.log(1.5) / 4, 0.0], abs=1e-7)
    assert nll.Head(unembedding, 1.0, None).divergence(x, y[:0], torch.zeros(0, dtype=torch.int64)).shape == (0,)


def test_divergences_of_any_size_are_those_of_float64():
    g = torch.Generator().manual_seed(4)
    unembedding = nn.Linear(64, 20_000, bias=False)
    unembedding.weight = nn.Parameter(torch.randn((20_000, 64), generator=g), requires_grad=False)
    x = torch.randn((600, 64), generator=g)
    x[:100] *= 20  # logits of hundreds, which float32 rounds to 3e-5
    size = 10 ** torch.linspace(-4, 1, 600)[torch.randperm(600, generator=g)]
    y = x + size.unsqueeze(1) * torch.randn((600, 64), generator=g)
    y[0], y[1] = -x[0], x[1]
    weight = unembedding.weight.double()
    p, q = ((z.double() @ weight.T).log_softmax(1) for z in (x, y))
    expected = (p.exp() * (p - q)).sum(1)
    found = nll.Head(unembedding, 1.0, None).divergence(x, y, torch.arange(600))
    assert expected.min() < 1e-6 and expected[0] > 1000 and found[1] == 0 and found.min() >= 0
    assert torch.allclose(found[100:], expected[100:], rtol=1e-4, atol=1e-6)
    assert torch.allclose(found, expected, rtol=1e-4, atol=3e-4)


def test_rows_with_near_ties_and_large_logits_are_within_1e_4_of_float64():
    g = torch.Generator().manual_seed(3)
    weight = torch.randn((20_000, 64), generator=g)
    weight[5_000:5_050] = weight[7] + 1e-4 * torch.randn((50, 64), generator=g)  # in another chunk than 7
    x = torch.randn((40, 64), generator=g)
    x[:10] = weight[7] * torch.linspace(0.01, 3, 10).unsqueeze(1)  # near ties, up to logits of 200
    x[10:20] *= 30  # logits of a thousand
    x[20] = 0
    unembedding = nn.Linear(64, 20_000, bias=False)
    unembedding.weight = nn.Parameter(weight, requires_grad=False)
    wanted = torch.randint(0, 20_000, (40,), generator=g)
    wanted[:10] = torch.tensor([7, 5_000, 5_049, 19_999, 0, 7, 5_001, 7, 5_002, 12])
    expected = F.cross_entropy(x.double() @ weight.double().T, wanted, reduction="none")
    found = nll.Head(unembedding, 1.0, None).nll(x, wanted).double()
    small = expected < 400
    assert small.sum() >= 30 and (found - expected)[small].abs().max() < 1e-4
    assert ((found - expected).abs() / expected.clamp(min=1)).max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cap_that_is_not_known_is_no_scale(dtype):
    torch.manual_seed(0)
    config = transformers.RecurrentGemmaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=1, lru_width=64, head_dim=16, attention_window_size=32,
    )  # fmt: skip
    model = transformers.RecurrentGemmaForCausalLM(config).eval().requires_grad_(False)
    model.get_input_embeddings().weight.mul_(100)  # logits that the cap of 30 bends
    assert nll.head_of(model.to(dtype)) is None


def test_a_model_that_makes_its_logits_otherwise_is_asked_for_all_of_them():
    model = make("llama")
    model.lm_head.register_forward_hook(lambda _module, _inputs, logits: logits.sort(-1).values)
    assert nll.head_of(model) is None
    ids = torch.randint(3, VOCABULARY, (1, 6), generator=torch.Generator().manual_seed(0))
    expected = F.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="none")
    found = nll.token_nll(model, ids, torch.ones_like(ids), torch.ones((1, 5), dtype=torch.bool))
    assert torch.allclose(found[0], expected, atol=1e-6)
    stream = torch.randn((4, 16))
    expected = F.cross_entropy(hookpoints.logits_of(model, stream), torch.arange(4), reduction="none")
    assert torch.allclose(nll.stream_nll(model, stream, torch.arange(4)), expected, atol=1e-6)
    both = nll.stream_outputs(model, stream)
    assert both.shape == (4, VOCABULARY)
    p, q = both.double().log_softmax(1)[[1, 2]]
    found = nll.divergence(model, both, both[[2, 1]], torch.tensor([1, 1]))
    assert torch.allclose(found, torch.stack([(p.exp() * (p - q)).sum(), torch.zeros((), dtype=p.dtype)]), atol=1e-9)
