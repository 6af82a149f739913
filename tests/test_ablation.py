"""Feature ablation on a tiny model: exactness against the straightforward way, and the figures drawn from it."""

import numpy as np
import polars as pl
import pytest
import torch
import transformers
from torch.nn import functional as F  # noqa: N812

from babelscope.evaluation import ablation, nll, selectivity
from babelscope.models import hookpoints, tokens
from babelscope.sae.autoencoder import SAE

D, LATENTS, K = 16, 48, 3
NAMES = ["layers.1.mlp", "layers.1", "layers.3.mlp"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=D, num_hidden_layers=5, num_attention_heads=2, intermediate_size=24
    )
    return transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def saes(model):
    g = torch.Generator().manual_seed(2)
    made = {}
    for name in NAMES:
        decoder = F.normalize(torch.randn(LATENTS, D, generator=g), dim=1)
        made[name] = SAE(decoder * 0.7, decoder, torch.zeros(LATENTS), torch.randn(D, generator=g) * 0.01, K)
    return made


@pytest.fixture(scope="module")
def texts():
    g = torch.Generator().manual_seed(3)
    return tokens.by_length(
        [
            tokens.TokenizedText(f"t{i}", (1, *torch.randint(2, 60, (2 + i % 9,), generator=g).tolist()), 1)
            for i in range(30)
        ]
    )


CONDITIONS = [
    ablation.Condition("nothing", {}),
    ablation.Condition("everything", {name: range(LATENTS) for name in NAMES}),
    ablation.Condition("few", {"layers.1.mlp": [0, 1, 2], "layers.3.mlp": [5]}),
    ablation.Condition("late", {"layers.3.mlp": list(range(8))}),
    ablation.Condition("residual", {"layers.1": list(range(0, LATENTS, 5))}),
]


def straightforward(model, saes, text, condition):
    """One whole pass for one text and one condition, no batches, dense arithmetic."""
    ids = torch.tensor([text.ids])

    def edit(name):
        def change(x):
            values, indices = saes[name].encode(x)
            dense = torch.zeros(*x.shape[:-1], LATENTS).scatter(-1, indices, values)
            mask = torch.zeros(LATENTS)
            mask[list(condition.units.get(name, []))] = 1
            part = (dense * mask) @ saes[name].W_dec
            part[:, : text.special] = 0  # the tokenizer's own tokens stay as they are
            return x - part

        return change

    with hookpoints.editing(model, {name: edit(name) for name in saes}):
        logits = model(input_ids=ids, use_cache=False).logits
    losses = F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none")
    return losses[max(text.special - 1, 0) :].sum().item()


def test_same_numbers_as_one_whole_pass_per_text_and_condition(model, saes, texts):
    result = ablation.ablate(model, saes, texts, CONDITIONS, batch_tokens=64)
    with torch.inference_mode():
        for row, condition in enumerate(CONDITIONS):
            slow = torch.tensor([straightforward(model, saes, text, condition) for text in texts])
            assert torch.allclose(result.ablated[row].float(), slow, atol=1e-4), condition.name
    assert torch.equal(result.tokens, torch.tensor([text.own for text in texts]))


def test_what_cannot_change_is_not_computed_and_equals_the_clean_run_exactly(model, saes, texts):
    result = ablation.ablate(model, saes, texts, CONDITIONS, batch_tokens=64)
    assert torch.equal(result.ablated[0], result.clean)
    assert (result.ablated[1] != result.clean).all()
    computed = len(texts) * (len(CONDITIONS) - 1)
    assert 0 < result.passes < computed
    changed = result.ablated != result.clean
    assert int(changed.sum()) <= result.passes


def test_an_interrupted_run_goes_on_from_the_batches_that_it_kept(model, saes, texts, tmp_path):
    whole = ablation.ablate(model, saes, texts, CONDITIONS, batch_tokens=64, keep=tmp_path)
    kept = sorted(tmp_path.iterdir())
    assert len(kept) > 2
    kept[1].unlink()
    done = []

    def count(*_args):
        done.append(1)

    handle = model.lm_head.register_forward_hook(count)
    again = ablation.ablate(model, saes, texts, CONDITIONS, batch_tokens=64, keep=tmp_path)
    some = len(done)
    ablation.ablate(model, saes, texts, CONDITIONS, batch_tokens=64)
    handle.remove()
    assert torch.equal(whole.ablated, again.ablated) and torch.equal(whole.clean, again.clean)
    assert whole.passes == again.passes and 0 < some < (len(done) - some) / 2


def test_removing_nothing_changes_no_logit_by_a_single_bit(model, saes, texts):
    ids, mask = tokens.pad(texts)
    clean = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    nothing = torch.zeros(len(texts), LATENTS, dtype=torch.bool)
    own = mask.bool()
    with hookpoints.editing(model, {name: ablation.remove(sae, nothing, own) for name, sae in saes.items()}):
        same = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    assert torch.equal(clean, same)
    one = nothing.clone()
    one[3] = True
    with hookpoints.editing(model, {"layers.1": ablation.remove(saes["layers.1"], one, own)}):
        other = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    same_rows = (other == clean).flatten(1).all(1)
    assert not same_rows[3] and same_rows.sum() == len(texts) - 1


def test_nll_counts_every_own_token_that_has_something_before_it(model):
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    assert nll.targets(mask, torch.tensor([1, 1])).tolist() == [[True, True, True], [True, False, False]]
    assert nll.targets(mask, torch.tensor([0, 0])).tolist() == [[True, True, True], [True, False, False]]
    assert nll.targets(mask, torch.tensor([2, 2])).tolist() == [[False, True, True], [False, False, False]]
    ids = torch.tensor([[1, 5, 6, 7], [1, 5, 0, 0]])
    found = nll.text_nll(model, ids, mask, torch.tensor([1, 1]))
    logp = model(input_ids=ids[:1], use_cache=False).logits.log_softmax(-1)[0]
    assert found[0].item() == pytest.approx(-(logp[0, 5] + logp[1, 6] + logp[2, 7]).item(), rel=1e-5)
    assert found[1].item() == pytest.approx(-logp[0, 5].item(), rel=1e-5)


def test_a_text_of_one_token_has_no_target(model, saes):
    alone = [tokens.TokenizedText("a", (7,), 0), tokens.TokenizedText("b", (7, 8), 0)]
    result = ablation.ablate(model, saes, alone, CONDITIONS, batch_tokens=8)
    assert result.tokens.tolist() == [0, 1]
    assert result.clean[0] == 0 and (result.ablated[:, 0] == 0).all()


def test_cells_are_sums_over_tokens_with_an_interval_around_them():
    clean, count = np.array([10.0, 20.0, 5.0]), np.array([5, 10, 5])
    ablated = np.array([[11.0, 24.0, 5.0], [10.0, 20.0, 5.0]])
    cells = selectivity.cells(clean, ablated, count, ["en", "en", "no"], resamples=200, seed=0)
    assert cells.columns == ["condition", "evaluated", "nll", "tokens", "delta", "low", "high"]
    row = cells.row(by_predicate=(pl.col("condition") == 0) & (pl.col("evaluated") == "en"), named=True)
    assert row["nll"] == pytest.approx(35 / 15) and row["delta"] == pytest.approx(5 / 15) and row["tokens"] == 15
    assert row["low"] == pytest.approx(1 / 5) and row["high"] == pytest.approx(4 / 10)
    still = cells.filter(condition=1)
    assert still.select(pl.all_horizontal((pl.col("delta", "low", "high") == 0).all())).item()
    assert cells.filter(condition=-1)["nll"].to_list() == pytest.approx([2.0, 1.0])
    assert cells.equals(selectivity.cells(clean, ablated, count, ["en", "en", "no"], resamples=200, seed=0))


def test_bootstrap_interval_has_the_width_of_the_standard_error():
    random = np.random.default_rng(0)
    count = np.full(400, 10)
    change = random.normal(1.0, 2.0, 400)
    cells = selectivity.cells(np.zeros(400), change[None], count, ["en"] * 400, resamples=4000, seed=1)
    row = cells.filter(condition=0).row(0, named=True)
    error = change.std() / np.sqrt(400) / 10
    assert (row["high"] - row["low"]) / (2 * 1.96 * error) == pytest.approx(1.0, abs=0.08)


def test_selectivity_by_hand():
    delta = {("a", "a"): 0.5, ("a", "b"): 0.1, ("b", "a"): -0.2, ("b", "b"): 0.05, ("c", "a"): 0, ("c", "b"): 0}
    delta |= {("a", "c"): 0.0, ("b", "c"): 0.3, ("c", "c"): 0.0}
    frame = pl.DataFrame([{"ablated": a, "evaluated": e, "delta": float(v)} for (a, e), v in delta.items()])
    result = selectivity.selectivity(frame, ["a", "b", "c"])
    assert result["own"] == pytest.approx(0.55 / 3) and result["others"] == pytest.approx(0.2 / 6)
    assert result["others_abs"] == pytest.approx(0.6 / 6)
    assert result["difference"] == pytest.approx(0.15)
    assert result["ratio"] == pytest.approx(np.exp(0.15))
    assert (result["rows"], result["columns"]) == (1, 1)
    assert result["dnll_own/c"] == 0
