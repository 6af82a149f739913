"""Ablation on tiny models: exactness against the straightforward way, whatever the family, the method and the place."""

import functools
import zlib

import numpy as np
import polars as pl
import pytest
import torch
import transformers
from torch.nn import functional as F  # noqa: N812

from babelscope.ablation import ablate, conditions, run, statistics
from babelscope.ablation.interventions import Additive, Directional, FeatureAblation, NeuronAblation, basis
from babelscope.ablation.statistics import Measured
from babelscope.models import hookpoints, nll, partial, tokens
from babelscope.sae.autoencoder import SAE

D, LATENTS, K, VOCABULARY = 16, 64, 3, 60
TINY = {"vocab_size": VOCABULARY, "hidden_size": D, "num_hidden_layers": 5, "num_attention_heads": 4}
LLAMA = {**TINY, "num_key_value_heads": 2, "intermediate_size": 24, "pad_token_id": 0}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": D, "n_layer": 5, "n_head": 2}
FAMILIES = {
    "llama": (transformers.LlamaConfig, LLAMA),
    "gpt2": (transformers.GPT2Config, GPT2),
    "qwen2": (transformers.Qwen2Config, LLAMA),
    "gpt_neox": (transformers.GPTNeoXConfig, {**TINY, "intermediate_size": 24}),
    "gemma2": (transformers.Gemma2Config, {**LLAMA, "head_dim": 8, "sliding_window": 4}),
    "mistral": (transformers.MistralConfig, {**LLAMA, "sliding_window": 5}),
    "bloom": (transformers.BloomConfig, {"vocab_size": VOCABULARY, "hidden_size": D, "n_layer": 5, "n_head": 2}),
}
PARTLY = {"llama": True, "gpt2": True, "qwen2": True, "gpt_neox": True, "gemma2": False, "mistral": False}


def make(family):
    kind, options = FAMILIES[family]
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(kind(**options)).eval().requires_grad_(False)
    for parameter in model.parameters():  # the usual initialisation is so small that a change would not be seen
        if parameter.dim() > 1:
            parameter.mul_(6)
    return model


@pytest.fixture(scope="module")
def model():
    return make("llama")


def names(model):
    root = "h" if model.config.model_type in ("gpt2", "bloom") else "layers"
    return [f"{root}.1.mlp", f"{root}.1", f"{root}.2.mlp", f"{root}.4.mlp"]


def make_saes(model):
    g = torch.Generator().manual_seed(2)
    made = {}
    for name in names(model):
        decoder = F.normalize(torch.randn(LATENTS, D, generator=g), dim=1)
        made[name] = SAE(decoder * 0.7, decoder, torch.zeros(LATENTS), torch.randn(D, generator=g) * 0.01, K)
    return made


@pytest.fixture(scope="module")
def saes(model):
    return make_saes(model)


def make_texts(special=1, count=24):
    g = torch.Generator().manual_seed(3)
    ids = [(*(1,) * special, *torch.randint(2, VOCABULARY, (1 + i % 9,), generator=g).tolist()) for i in range(count)]
    return tokens.by_length([tokens.TokenizedText(f"t{i:02d}", text, special) for i, text in enumerate(ids)])


def make_conditions(model):
    first, residual, second, last = names(model)
    return [
        {},
        {name: range(LATENTS) for name in names(model)},
        {first: [0, 1, 2], last: [5]},
        {last: range(0, LATENTS, 6)},
        {residual: range(0, LATENTS, 16), second: range(0, LATENTS, 9)},
        {second: range(0, LATENTS, 12), last: range(4)},
    ]


def by_hookpoint(model, conditions, make_one):
    return {name: make_one(name, [list(c.get(name, ())) for c in conditions]) for name in names(model)}


def features(model, saes, conditions):
    return by_hookpoint(model, conditions, lambda name, units: FeatureAblation(saes[name], units))


def largest(name):
    return torch.rand(LATENTS, generator=torch.Generator().manual_seed(len(name)))


def by_feature(saes, name, units, x):
    values, indices = saes[name].encode(x)
    dense = torch.zeros(*x.shape[:-1], LATENTS).scatter(-1, indices, values)
    return x - dense[..., units] @ saes[name].W_dec[units]


def by_direction(saes, name, units, x):
    rows = saes[name].W_dec[units]
    return x - (x @ rows.T) @ torch.linalg.pinv(rows @ rows.T, rtol=1e-6) @ rows if units else x


def by_addition(saes, name, units, x):
    return x - 0.2 * (largest(name)[units].unsqueeze(1) * saes[name].W_dec[units]).sum(0)


METHODS = {
    "feature": (by_feature, lambda saes: lambda name, units: FeatureAblation(saes[name], units)),
    "directional": (by_direction, lambda saes: lambda name, units: Directional(saes[name], units)),
    "additive": (by_addition, lambda saes: lambda name, units: Additive(saes[name], units, largest(name), -0.2)),
}


def straightforward(model, change, text, condition):
    """One whole pass for one text and one condition, no batches, no skipping."""
    ids = torch.tensor([text.ids])

    def edit(name):
        def apply(x):
            changed = change(name, list(condition.get(name, ())), x)
            return torch.cat([x[:, : text.special], changed[:, text.special :]], 1)

        return apply

    with hookpoints.editing(model, {name: edit(name) for name in condition}):
        logits = model(input_ids=ids, use_cache=False).logits
    losses = F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none")
    return losses[max(text.special - 1, 0) :].double().sum().item()


def assert_same(model, interventions, change, texts, conditions, batch_tokens=40):
    result = ablate.ablate(model, interventions, texts, batch_tokens)
    with torch.inference_mode():
        for row, condition in enumerate(conditions):
            slow = torch.tensor([straightforward(model, change, text, condition) for text in texts])
            assert torch.allclose(result.ablated[row].float(), slow, atol=1e-4, rtol=0), condition
    assert torch.equal(result.tokens, torch.tensor([text.content_tokens - (text.special == 0) for text in texts]))
    return result


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("family", "special"), [*((family, 1) for family in FAMILIES), ("llama", 0), ("llama", 2), ("bloom", 0)]
)
def test_same_numbers_as_one_whole_pass_per_text_and_condition(family, method, special):
    model = make(family)
    saes, conditions = make_saes(model), make_conditions(model)
    if method == "directional":  # a few directions: without all of its dimensions an activation is rounding noise
        conditions = [{name: list(units)[:4] for name, units in condition.items()} for condition in conditions]
    change, make_one = METHODS[method]
    interventions = by_hookpoint(model, conditions, make_one(saes))
    texts = make_texts(special, 12)
    result = assert_same(model, interventions, lambda *a: change(saes, *a), texts, conditions)
    assert torch.equal(result.ablated[0], result.clean)
    changed = (result.ablated[1] != result.clean)[torch.tensor([text.content_tokens > 1 for text in texts])]
    assert changed.float().mean() > 0.9
    assert partial.suits(model, max(len(text.ids) for text in texts)) == PARTLY.get(family, False)


def logits_under(model, change, text, condition):
    """The distribution of the next token at each token of a text, one whole pass."""
    edits = {name: functools.partial(change, name, list(units)) for name, units in condition.items()}

    def content(edit):
        return lambda x: torch.cat([x[:, : text.special], edit(x)[:, text.special :]], 1)

    with hookpoints.editing(model, {name: content(edit) for name, edit in edits.items()}):
        return model(input_ids=torch.tensor([text.ids]), use_cache=False).logits[0].double().log_softmax(-1)


@pytest.mark.parametrize("family", ["llama", "gemma2", "bloom"])
def test_the_divergence_is_that_of_whole_passes_on_a_sample_of_the_tokens(family, monkeypatch, tmp_path):
    model = make(family)
    saes, sets, texts = make_saes(model), make_conditions(model), make_texts(1, 16)
    monkeypatch.setattr(ablate, "ROWS", 8)
    diverging = torch.tensor([True, True, False, True, True, True])
    done = features(model, saes, sets)
    for every in (1, 3):
        found = ablate.ablate(model, done, texts, 40, diverging=diverging, kl_every=every, keep=tmp_path / str(every))
        expected, sampled = torch.zeros(len(sets), len(texts), dtype=torch.float64), []
        for at, text in enumerate(texts):
            start = zlib.crc32(text.text_id.encode())
            chosen = [n for n in range(max(text.special - 1, 0), len(text.ids) - 1) if (start + n) % every == 0]
            sampled.append(len(chosen))
            p = logits_under(model, None, text, {})[chosen]
            for row, condition in enumerate(sets):
                q = logits_under(model, functools.partial(by_feature, saes), text, condition)[chosen]
                expected[row, at] = (p.exp() * (p - q)).sum()
        assert found.sampled.tolist() == sampled and found.kl[2].isnan().all()
        assert torch.allclose(found.kl[diverging], expected[diverging], rtol=1e-3, atol=1e-5)
        assert not found.kl[0].any() and found.kl[1].max() > 0.1
        again = ablate.ablate(model, done, texts, 40, diverging=diverging, kl_every=every, keep=tmp_path / str(every))
        assert torch.equal(again.kl.nan_to_num(-1), found.kl.nan_to_num(-1))
    assert sum(sampled) < 0.5 * int(found.tokens.sum())
    none = ablate.ablate(model, done, texts, 40)
    assert none.kl.isnan().all() and not none.sampled.any() and torch.equal(none.ablated, found.ablated)


def test_neurons_are_set_to_zero_and_inner_hookpoints_are_exact(model):
    places = ["layers.1.mlp.act_fn", "layers.3.self_attn.v_proj", "layers.4.mlp.act_fn"]
    sets = [{}, {places[0]: [1, 5], places[2]: [3]}, {places[1]: [2]}, {places[1]: [0], places[2]: range(24)}]
    width = {name: hookpoints.width(model, name) for name in places}
    assert width == {places[0]: 24, places[1]: 8, places[2]: 24}
    done = {name: NeuronAblation(width[name], [list(s.get(name, ())) for s in sets]) for name in places}

    def zero(name, units, x):
        changed = x.clone()
        changed[..., units] = 0
        return changed

    result = assert_same(model, done, zero, make_texts(), sets)
    assert torch.equal(result.ablated[0], result.clean)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_what_cannot_change_is_not_computed_and_equals_the_clean_run_exactly(family):
    model = make(family)
    saes, sets, texts = make_saes(model), make_conditions(model), make_texts()
    result = ablate.ablate(model, features(model, saes, sets), texts, 40)
    assert torch.equal(result.ablated[0], result.clean)
    changed = result.ablated != result.clean
    assert int(changed.sum()) <= result.passes < len(texts) * (len(sets) - 1)
    assert 0 < result.share < (0.4 if family == "llama" else 0.8)


def test_a_change_late_in_a_text_leaves_what_stands_before_it(model, saes):
    """One token of one text fires: the work is that token at the hookpoint's block, and the few behind it above."""
    text = make_texts(special=1, count=9)[-1]
    ids = torch.tensor([text.ids])
    x = hookpoints.read(model, ["layers.2.mlp"], input_ids=ids)["layers.2.mlp"][0]
    values, indices = saes["layers.2.mlp"].encode(x)
    fires = [set(i[v > 0].tolist()) for v, i in zip(values, indices, strict=True)]
    place = len(fires) - 3
    unit = next(u for u in fires[place] if not any(u in other for n, other in enumerate(fires) if n and n != place))
    one = {"layers.2.mlp": FeatureAblation(saes["layers.2.mlp"], [[unit]])}
    result = ablate.ablate(model, one, [text], 40)
    assert result.passes == 1 and result.clean != result.ablated[0]
    assert result.share == pytest.approx((1 + 2 * 2) / (5 * len(text.ids)))  # the last token predicts nothing


def test_the_size_of_the_passes_changes_nothing_but_rounding(model, saes):
    sets, texts = make_conditions(model), make_texts()
    found = [ablate.ablate(model, features(model, saes, sets), texts, size) for size in (10, 64, 5000)]
    for other in found[1:]:
        assert torch.allclose(found[0].ablated, other.ablated, atol=1e-5) and other.passes == found[0].passes
        assert other.share == pytest.approx(found[0].share)


def test_passes_over_parts_of_texts_come_in_few_sizes(model, saes, monkeypatch):
    sizes = {"blocks": [], "head": [], "sae": []}
    run_blocks, logits_of, encode = hookpoints.run_blocks, hookpoints.logits_of, SAE.encode

    def blocks(model, layers, hidden, **inputs):
        if hidden is not None:  # the clean passes come in whatever size they have
            sizes["blocks"].append(hidden.shape[1])
        return run_blocks(model, layers, hidden, **inputs)

    monkeypatch.setattr(hookpoints, "run_blocks", blocks)
    monkeypatch.setattr(hookpoints, "logits_of", lambda model, x: sizes["head"].append(len(x)) or logits_of(model, x))
    monkeypatch.setattr(SAE, "encode", lambda sae, x: sizes["sae"].append(len(x)) or encode(sae, x))
    monkeypatch.setattr(partial, "suits", lambda *_: True)
    for batch_tokens in (10, 400):
        ablate.ablate(model, features(model, saes, make_conditions(model)), make_texts(), batch_tokens)
    few = {1, 2, 4, 8, 16, 32}
    assert {size % 64 for size in sizes["blocks"] + sizes["sae"] if size not in few} == {0}
    assert max(sizes["blocks"]) > 128 and few & {*sizes["blocks"]}
    assert {*sizes["head"]} <= few | {*range(64, 513, 64)} and 128 in sizes["head"]


def test_what_fills_a_pass_up_widens_no_threshold_sae():
    g = torch.Generator().manual_seed(4)
    decoder, mean = F.normalize(torch.randn(64, D, generator=g), dim=1), torch.full((D,), 3.0)
    sae = SAE(decoder, decoder, torch.zeros(64), mean, threshold=torch.full((64,), 2.5))
    x = mean + decoder[:7] * 3
    done = FeatureAblation(sae, [[0], [5]])
    assert sae.encode(torch.zeros(1, D))[0].shape[1] > sae.encode(x)[0].shape[1]
    assert done._encode(x)[0].shape == sae.encode(x)[0].shape
    assert done.affected_tokens(x).nonzero().tolist() == [[0, 0], [1, 5]]


def test_a_model_may_have_fewer_positions_than_a_pass_has_tokens():
    torch.manual_seed(1)
    config = transformers.GPT2Config(**{**GPT2, "n_positions": 12})
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    hidden, wanted = torch.randn(20, D), torch.arange(20)
    expected = F.cross_entropy(model.lm_head(model.transformer.ln_f(hidden)), wanted, reduction="none")
    assert torch.allclose(nll.stream_nll(model, hidden, wanted), expected, atol=1e-5)
    assert partial.suits(model, 12)


def test_pairs_that_were_not_asked_for_are_not_computed(model, saes):
    sets, texts = make_conditions(model), make_texts()
    asked = torch.zeros(len(sets), len(texts), dtype=torch.bool)
    asked[1, 3:9] = True
    some = ablate.ablate(model, features(model, saes, sets), texts, 40, asked=asked)
    every = ablate.ablate(model, features(model, saes, sets), texts, 40)
    assert torch.equal(some.ablated.isnan(), ~asked) and some.passes <= 6
    assert torch.allclose(some.ablated[asked], every.ablated[asked], atol=1e-5)


def test_an_interrupted_run_goes_on_from_the_batches_that_it_kept(model, saes, tmp_path):
    done, texts = features(model, saes, make_conditions(model)), make_texts()
    whole = ablate.ablate(model, done, texts, 40, keep=tmp_path)
    kept = sorted(tmp_path.iterdir())
    assert len(kept) > 2
    kept[1].unlink()
    calls = []
    handle = model.lm_head.register_forward_pre_hook(lambda *_: calls.append(1))
    again = ablate.ablate(model, done, texts, 40, keep=tmp_path)
    some = len(calls)
    ablate.ablate(model, done, texts, 40)
    handle.remove()
    assert torch.equal(whole.ablated, again.ablated) and torch.equal(whole.clean, again.clean)
    assert (whole.passes, whole.share) == (again.passes, again.share) and 0 < some < (len(calls) - some) / 2


def test_the_model_is_left_as_it_was(model, saes):
    before, attention = list(hookpoints.blocks(model)), model.config._attn_implementation
    ablate.ablate(model, features(model, saes, make_conditions(model)), make_texts(), 40)
    assert all(a is b for a, b in zip(before, hookpoints.blocks(model), strict=True))
    assert model.config._attn_implementation == attention
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_text_of_one_token_has_no_target(model, saes):
    alone = [tokens.TokenizedText("a", (7,), 0), tokens.TokenizedText("b", (7, 8), 0)]
    for texts in (alone, alone[:1]):
        result = ablate.ablate(model, features(model, saes, make_conditions(model)), texts, 8)
        assert result.tokens.tolist() == [0, 1][: len(texts)]
        assert result.clean[0] == 0 and (result.ablated[:, 0] == 0).all()


def test_directions_are_projected_out_by_hand(saes):
    sae = SAE(torch.eye(3), torch.tensor([[2.0, 0, 0], [1.0, 1, 0], [3.0, 3, 0]]), torch.zeros(3), torch.ones(3), 1)
    x = torch.tensor([[1.0, 2, 3], [4.0, 5, 6], [7.0, 8, 9], [1.0, 1, 1]])
    done = Directional(sae, [[1], [0, 1], [1, 2], []])
    found = done.change(x, torch.arange(4))
    assert torch.allclose(found[0], torch.tensor([-0.5, 0.5, 3.0]), atol=1e-6)  # off (1, 1, 0) / sqrt 2
    assert torch.allclose(found[1], torch.tensor([0.0, 0, 6.0]), atol=1e-6)
    assert torch.allclose(found[2], torch.tensor([-0.5, 0.5, 9.0]), atol=1e-6)  # both rows: one direction
    assert torch.equal(found[3], x[3]) and done.active.tolist() == [True, True, True, False]
    assert basis(sae.W_dec).shape == (3, 2)


def test_many_conditions_take_memory_by_their_units_and_give_what_a_table_of_all_pairs_gives():
    g = torch.Generator().manual_seed(6)
    latents, decoder = 512, F.normalize(torch.randn(512, D, generator=g), dim=1)
    sae, x = SAE(decoder, decoder, torch.zeros(latents), torch.zeros(D), 8), torch.randn(40, D, generator=g)
    sets = [[n] for n in range(0, latents, 2)] + [[], [3, 3, 9, 4], list(range(100, 180)), [4]]
    done = FeatureAblation(sae, sets)
    kept = [value for value in vars(done).values() if isinstance(value, torch.Tensor)]
    assert sum(value.numel() for value in kept) < 3 * (latents + len(sets) + sum(map(len, sets)))
    values, indices = sae.encode(x)
    table = torch.zeros(len(sets), latents, dtype=torch.bool)
    for row, units in enumerate(sets):
        table[row, units] = True
    assert torch.equal(done.affected_tokens(x), (table[:, indices] & (values > 0)).any(-1))
    dense = torch.zeros(len(x), latents).scatter(1, indices, values)
    condition = torch.randint(len(sets), (len(x),), generator=g)
    condition[:4] = torch.arange(len(sets) - 4, len(sets))
    torch.testing.assert_close(done.change(x, condition), x - (dense * table[condition]) @ decoder)
    nothing = FeatureAblation(sae, [[], []])
    assert torch.equal(nothing.change(x, condition * 0), x) and not nothing.affected_tokens(x).any()


def test_the_additive_vector_by_hand():
    sae = SAE(torch.eye(3), torch.tensor([[2.0, 0, 0], [1.0, 1, 0], [3.0, 3, 0]]), torch.zeros(3), torch.ones(3), 1)
    done = Additive(sae, [[0, 1], []], torch.tensor([10.0, 5.0, 99.0]), -0.2)
    assert torch.allclose(done.change(torch.ones(2, 3), torch.tensor([0, 1])), torch.tensor([[-4.0, 0, 1], [1, 1, 1]]))


def test_removing_nothing_changes_no_bit(model, saes):
    x = torch.randn(7, D)
    one = FeatureAblation(saes["layers.1"], [[], list(range(LATENTS))])
    found = one.change(x, torch.tensor([0, 1, 0, 1, 0, 0, 0]))
    assert torch.equal(found[[0, 2, 4, 5, 6]], x[[0, 2, 4, 5, 6]]) and (found[[1, 3]] != x[[1, 3]]).any(1).all()


COUNTED = pl.DataFrame(
    [(u, name, 1 + (u * 37 + 11 * at) % 400) for u in range(300) for at, name in enumerate(["en", "fi"]) if u != at],
    schema={"unit": pl.Int32, "language": pl.String, "tokens": pl.Int64}, orient="row",
)  # fmt: skip
OWNED = pl.DataFrame(
    [("layers.1", u, name) for u, name in [(3, "en"), (9, "en"), (40, "en"), (77, "en"), (5, "fi"), (8, "fi")]]
    + [("layers.2", 6, "en")],
    schema={"hookpoint": pl.String, "unit": pl.Int32, "language": pl.String}, orient="row",
)  # fmt: skip


TOTALS = pl.DataFrame({"language": ["en", "fi", "sv"], "tokens": [1000, 1000, 1000]})


def drawn(counts, language, draws, *, owned=OWNED, totals=TOTALS, ratio=1e-9, seed=0):
    """At so low a ratio every language is a member, and no unit has but one."""
    return conditions.matched(counts, totals, owned, "layers.1", language, ratio=ratio, draws=draws, seed=seed)


@pytest.mark.parametrize(("language", "units"), [("en", [3, 9, 40, 77]), ("fi", [5, 8])])
def test_controls_fire_as_often_and_belong_to_no_language(language, units):
    draws = drawn(COUNTED, language, 6)
    rate = dict(COUNTED.filter(language=language).select("unit", "tokens").iter_rows())
    assert len(draws) == 6 and len({tuple(draw) for draw in draws}) > 1
    fires = sum(rate[u] for u in units)
    for draw in draws:
        assert len(set(draw)) == len(draw) and not set(draw) & {3, 9, 40, 77, 5, 8}
        # The pool is dense: what few units lack is made up by one or two small ones.
        assert len(units) <= len(draw) <= len(units) + 2
        assert fires <= sum(rate[u] for u in draw) < 1.25 * fires
    assert draws == drawn(COUNTED.sample(fraction=1, shuffle=True, seed=1), language, 6)
    assert draws[:3] == drawn(COUNTED, language, 3)
    assert draws != drawn(COUNTED, language, 6, seed=1)


def test_more_units_are_drawn_where_none_fires_as_often():
    """The owned unit fires on 400 tokens, the others on 40 each: ten of these, and no more, fire as often."""
    counted = pl.DataFrame(
        [(u, name, 40 if u else 400) for u in range(61) for name in ("en", "fi")],
        schema=COUNTED.schema, orient="row",
    )  # fmt: skip
    owned = pl.DataFrame({"hookpoint": "layers.1", "unit": 0, "language": "en"}, schema=OWNED.schema)
    for draw in drawn(counted, "en", 3, owned=owned):
        assert len(set(draw)) == len(draw) == 10 and 0 not in draw


def test_units_that_would_be_the_languages_own_at_lower_thresholds_are_not_drawn():
    """Unit 1 fires on 10 % of en and on 4 % of fi, 2 as often on both, 3 at half the rate, 4 on fi alone."""
    counted = pl.DataFrame(
        [(0, "en", 10), (1, "en", 10), (1, "fi", 8), (2, "en", 10), (2, "fi", 20), (3, "en", 10), (3, "fi", 10),
         (4, "fi", 30), (4, "en", 0)],
        schema=COUNTED.schema, orient="row",
    )  # fmt: skip
    totals = pl.DataFrame({"language": ["en", "fi"], "tokens": [100, 200]})
    owned = pl.DataFrame({"hookpoint": "layers.1", "unit": 0, "language": "en"}, schema=OWNED.schema)
    for ratio, pool in ((0.5, {2, 3}), (0.51, {2}), (0.3, {1, 2, 3})):
        units = {u for [u] in drawn(counted, "en", 30, owned=owned, totals=totals, ratio=ratio)}
        assert units == pool, ratio


def test_controls_of_the_script():
    """Of what fires on ru, 1 fires most often on bg of all others, 2 on en, 3 on ru alone, 4 on none else but bg."""
    assert conditions.of_script(["ru", "en", "bg", "he", "ja", "zh-TW", "fi", "sr-Latn"]) == {
        "ru": ["bg"], "bg": ["ru"], "ja": ["zh-TW"], "zh-TW": ["ja"],
        "en": ["fi", "sr-Latn"], "fi": ["en", "sr-Latn"], "sr-Latn": ["en", "fi"],
    }  # fmt: skip
    counted = pl.DataFrame(
        [(0, "ru", 10), (1, "ru", 10), (1, "bg", 6), (1, "en", 8), (2, "ru", 10), (2, "bg", 6), (2, "en", 20),
         (3, "ru", 10), (4, "ru", 10), (4, "bg", 30), (5, "en", 9)],
        schema=COUNTED.schema, orient="row",
    )  # fmt: skip
    totals = pl.DataFrame({"language": ["ru", "bg", "en"], "tokens": [100, 100, 200]})
    owned = pl.DataFrame({"hookpoint": "layers.1", "unit": 0, "language": "ru"}, schema=OWNED.schema)
    options = {"ratio": 0.5, "by_layer": False, "draws": 20, "seed": 0, "script_draws": 30}
    what = conditions.conditions(owned, {"layers.1": counted}, totals, ["ru", "en", "bg"], **options)
    script = what.keys.filter("script")
    assert script["ablated"].to_list() == ["ru"] * 30 + ["bg"] * 30 and script["hookpoint"].null_count() == 60
    units = [what.units["layers.1"][row] for row in script["condition"]]
    assert {unit for [unit] in units[:30]} == {1, 4} and units[30:] == [[]] * 30
    plain = what.keys.filter(pl.col("control").is_not_null(), ~pl.col("script"), ablated="ru")["condition"]
    assert {unit for row in plain for unit in what.units["layers.1"][row]} == {1, 2, 4}
    assert conditions.control_rates(what, {"layers.1": counted}) == {"control_rate/ru": 1, "control_script_rate/ru": 1}
    some = what.only([0, 3, 4, *script["condition"][:2]])
    some.units["layers.1"][:] = [[0, 1], [2], [2, 3, 5], [], [4]]
    rates = conditions.control_rates(some, {"layers.1": counted})
    assert rates == {"control_rate/ru": 0.75, "control_script_rate/ru": 0.25}


def test_controls_where_there_are_few_units():
    few = COUNTED.filter(pl.col("unit").is_in([3, 9, 40, 77, 100, 101]))
    assert drawn(few, "en", 2) == [[100, 101]] * 2
    assert drawn(few, "sv", 2) == [[], []]


def test_conditions_are_each_language_its_controls_and_each_hookpoint_alone():
    what = conditions.conditions(
        OWNED,
        {"layers.1": COUNTED, "layers.2": COUNTED},
        TOTALS,
        ["fi", "en", "sv"],
        ratio=1e-9,
        by_layer=True,
        draws=2,
        seed=0,
    )
    keys = what.keys
    assert keys["condition"].to_list() == list(range(3 + 6 + 6))
    assert keys["ablated"].to_list() == ["fi", "en", "sv", "fi", "fi", "en", "en", "sv", "sv", *["fi", "en", "sv"] * 2]
    assert keys["control"].to_list() == [None] * 3 + [0, 1] * 3 + [None] * 6
    assert keys["hookpoint"].to_list() == [None] * 9 + ["layers.1"] * 3 + ["layers.2"] * 3
    assert what.units["layers.1"][:3] == [[5, 8], [3, 9, 40, 77], []]
    assert what.units["layers.2"][:3] == [[], [6], []]
    for name, own in {"layers.1": [2, 4, 0], "layers.2": [0, 1, 0]}.items():
        sizes, none = [len(units) for units in what.units[name]], [0] * 3
        assert sizes[:3] == own and sizes[9:] == (own + none if name == "layers.1" else none + own)
        assert all(n >= size and bool(n) == bool(size) for size, n in zip(np.repeat(own, 2), sizes[3:9], strict=True))
    only = what.only([4, 6, 8, 12, 13, 14])
    assert only.keys["condition"].to_list() == list(range(6)) and only.keys["control"].to_list() == [1] * 3 + [None] * 3
    assert only.units["layers.2"] == [*what.units["layers.2"][4:9:2], *what.units["layers.2"][12:]]


def test_a_condition_is_evaluated_on_its_language_and_on_samples_of_the_others():
    keys = pl.DataFrame(
        {
            "condition": [0, 1, 2],
            "ablated": ["a", "b", "b"],
            "hookpoint": [None, "h", None],
            "control": [None, None, 0],
            "top": [None] * 3,
        },
        schema_overrides={"control": pl.Int32},
    )
    language = ["a", "b", "c"] * 8
    tokens = np.array([10] * 24)
    what = conditions.Conditions(keys, {})
    assert what.asked(language, tokens, None).sum(1).tolist() == [24, 2 + 2 + 2, 8 + 2 + 2]
    is_first = conditions.first_half(language)
    assert is_first.reshape(8, 3).sum(0).tolist() == [4, 4, 4]
    for others, each in ((80, 8), (40, 4), (20, 2), (1, 2)):  # one text in each half at least
        asked = what.asked(language, tokens, others)
        by_language = asked.reshape(3, 8, 3).sum(1)  # conditions x languages
        assert by_language[0].tolist() == [8, each, each]
        less = min(each // 2, 2)
        assert by_language[1:].tolist() == [[less, own, less] for own in (2, 8)]
        assert not (asked[1] & ~is_first).any()  # a hookpoint alone is evaluated in the first half only
        if others == 40:  # a smaller sample is in a larger one, and has all lengths
            assert np.flatnonzero(asked[0][1::3]).tolist() == [0, 3, 4, 7]
            assert not (asked[2] & ~asked[0])[2::3].any()
    # Of a control, in the first half every second other language, in the second half the others.
    first, second = (by_language_in(what.only([2]), language, tokens, half) for half in (is_first, ~is_first))
    assert (first, second) == ([2, 4, 2], [0, 4, 0])
    of_a = conditions.Conditions(what.keys[2:].with_columns(ablated=pl.lit("a")), {})
    first, second = (by_language_in(of_a, language, tokens, half) for half in (is_first, ~is_first))
    assert (first, second) == ([4, 2, 0], [4, 0, 2])


def test_a_hookpoint_alone_is_evaluated_on_every_fourth_of_many_other_languages():
    keys = pl.DataFrame({"condition": [0], "ablated": ["c"], "hookpoint": ["h"], "control": [None], "top": [None]})
    asked = conditions.Conditions(keys, {}).asked([*"abcdefgh"] * 16, np.full(128, 10), None)[0]
    assert asked.reshape(16, 8).sum(0).tolist() == [0, 1, 2, 0, 0, 1, 0, 0]


def by_language_in(what, language, tokens, half):
    return (what.asked(language, tokens, None)[0] & half).reshape(8, 3).sum(0).tolist()


def test_a_sample_is_as_long_as_asked_for_and_leans_to_no_length():
    keys = pl.DataFrame({"condition": [0], "ablated": ["own"], "hookpoint": [None], "control": [None], "top": [None]})
    lengths = np.sort(np.random.default_rng(0).integers(3, 60, 41))
    language, tokens = ["other"] * 41, lengths.astype(np.int64)
    for wanted in (60, 130, 400, 900):
        chosen = tokens[conditions.Conditions(keys, {}).asked(language, tokens, wanted)[0]]
        assert abs(chosen.sum() - wanted) <= max(tokens.mean(), 0.15 * wanted), wanted
        assert abs(chosen.mean() / tokens.mean() - 1) < 0.2, wanted


def test_against_the_control_by_hand():
    """One text per language, so that only the draws vary: a's own units are above, b's only hurt others less."""
    keys = pl.DataFrame(
        [(0, "a", None), (1, "b", None), (2, "a", 0), (3, "a", 1), (4, "a", 2), (5, "b", 0), (6, "b", 1),
         (7, "c", None)],
        schema={"condition": pl.Int64, "ablated": pl.String, "control": pl.Int32}, orient="row",
    )  # fmt: skip
    nan = np.nan
    change = np.array(  # nats of texts in a (2 tokens), b (4 tokens), and another in b that the controls are not asked
        [[0.6, 0.0, 9.0], [0.0, 0.4, 9.0], [0.0, 0.0, nan], [0.2, 0.0, nan], [0.4, 0.0, nan], [0.4, 0.04, 0.0],
         [0.6, 0.8, 0.0], [0.0, 0.0, 0.0]]
    )  # fmt: skip
    change[1, 2] = change[5:7, 2] = nan
    tokens = np.array([2, 4, 7])
    found = statistics.against_control(change, tokens, ["a", "b", "b"], keys, ["b", "a", "c"], 600, seed=0)
    b, a = found.iter_rows(named=True)
    assert (b["language"], a["language"]) == ("b", "a")
    assert (a["own"], a["control"], a["others"], a["control_others"]) == pytest.approx((0.3, 0.1, 0.0, 0.0))
    assert (a["excess"], a["excess_low"], a["excess_high"]) == pytest.approx((0.2, 0.1, 0.3))
    assert (a["contrast"], a["contrast_low"], a["contrast_high"]) == pytest.approx((0.2, 0.1, 0.3))
    assert (b["own"], b["control"], b["control_high"], b["control_others"]) == pytest.approx((0.1, 0.105, 0.2, 0.25))
    assert (b["excess_low"], b["excess_high"]) == pytest.approx((-0.1, 0.09))
    assert (b["contrast"], b["contrast_low"], b["contrast_high"]) == pytest.approx((0.245, 0.2, 0.29))
    assert found.select("above", "selective").rows() == [(False, True), (True, True)]
    # b: every second resample is below 0, none of the contrast; a: none of 600 is at or below 0.
    assert found["p"].to_list() == pytest.approx([1, 2 / 601]) and found["p_holm"].to_list() == pytest.approx(
        [1, 4 / 601]
    )
    assert found["contrast_p"].to_list() == pytest.approx([2 / 601] * 2)
    assert found["contrast_p_holm"].to_list() == pytest.approx([4 / 601] * 2)


@pytest.mark.parametrize(
    ("resampled", "p"),
    [
        ([1, 2, 3, 4, 5, 6, 7, 8, 9], 0.2),  # 2 (1 + 0) / 10
        ([-1, 0, 3, 4, 5, 6, 7, 8, 9], 0.6),  # 2 (1 + 2) / 10: one below 0, one at 0
        ([-1, -2, -3, -4, -5, -6, -7, -8, 9], 0.4),  # the other side counts as well
        ([-1, 1, -1, 1], 1.0),  # 2 (1 + 2) / 5 is more than 1
        ([0, 0, 0], 1.0),
    ],
)
def test_the_p_value_by_hand(resampled, p):
    assert statistics.p_value(np.array(resampled, dtype=np.float64)) == pytest.approx(p)


def test_the_p_value_agrees_with_the_interval():
    """It is below 0.05 if the 95 % interval excludes 0, and above it if the interval includes 0 well inside."""
    for mean in np.linspace(-4, 4, 41):
        resampled = np.random.default_rng(0).normal(mean, size=1000)
        low, high = np.quantile(resampled, [0.024, 0.976])
        p = statistics.p_value(resampled)
        assert 2 / 1001 <= p <= 1 and (p < 0.05 or low <= 0 <= high)
        low, high = np.quantile(resampled, [0.026, 0.974])
        assert p > 0.05 or not low <= 0 <= high


def test_holms_correction_by_hand():
    # Smallest 0.005 * 4 = 0.02, then 0.01 * 3 = 0.03, 0.03 * 2 = 0.06, and 0.04 * 1, which may not be below 0.06.
    found = statistics.holm(np.array([0.01, 0.04, 0.03, 0.005]))
    assert found == pytest.approx([0.03, 0.06, 0.06, 0.02])
    nan = np.nan  # NaN is no test: 0.02 * 2, and 0.6 * 1
    assert statistics.holm(np.array([nan, 0.6, 0.02, nan])) == pytest.approx([nan, 0.6, 0.04, nan], nan_ok=True)
    assert statistics.holm(np.array([0.9, 0.8])) == pytest.approx([1.0, 1.0])
    assert statistics.holm(np.array([])).shape == (0,)
    fifteen = statistics.holm(np.full(15, 2 / 1001))  # the smallest p of 1,000 resamples passes in 15 languages
    assert fifteen == pytest.approx([30 / 1001] * 15) and (fifteen < statistics.LEVEL).all()


def test_holms_correction_keeps_the_order_and_makes_no_p_smaller():
    random = np.random.default_rng(0)
    for tests in range(1, 20):
        p = random.uniform(1e-4, 1, tests).round(2).clip(1e-4)
        found = statistics.holm(p)
        assert ((found >= p) & (found > 0) & (found <= np.minimum(1, tests * p + 1e-12))).all()
        assert (np.diff(found[np.argsort(p)]) >= 0).all()
        for level in (0.01, 0.05, 0.3):  # the step-down procedure itself: stop at the first that does not pass
            passed = 0
            while passed < tests and np.sort(p)[passed] * (tests - passed) < level:
                passed += 1
            assert (found < level).sum() == passed


def test_a_language_below_its_control_is_not_counted_as_above():
    change = np.array([[0.0] * 8 + [9.0] * 8, [9.0] * 8 + [9.0] * 8, [1.0] * 16, [8.0] * 8 + [0.0] * 8])
    keys = pl.DataFrame({"condition": [0, 1, 2, 3], "ablated": ["a", "a", "b", "b"], "control": [None, 0, 0, None]})
    found = statistics.against_control(
        change, np.ones(16, dtype=np.int64), ["a"] * 8 + ["b"] * 8, keys, ["a", "b"], 1000, seed=0
    )
    assert found["p_holm"].to_list() == pytest.approx([4 / 1001] * 2) and not found["above"].any()
    assert found.columns[-5:] == ["p", "p_holm", "contrast_p", "contrast_p_holm", "detectable"]


def test_the_interval_against_the_control_pairs_the_texts():
    """Texts differ much, yet own units cost each of them 0.1 more: the interval of the difference has no width."""
    change = np.random.default_rng(0).normal(size=(1, 30)) + np.array([[0.1], [0.0]])
    keys = pl.DataFrame(
        [(0, "a", None), (1, "a", 0)], schema={"condition": pl.Int64, "ablated": pl.String, "control": pl.Int32},
        orient="row",
    )  # fmt: skip
    found = statistics.against_control(change, np.ones(30, dtype=np.int64), ["a"] * 30, keys, ["a"], 200, seed=0)
    row = found.row(0, named=True)
    assert (row["excess_low"], row["excess_high"]) == pytest.approx((0.1, 0.1)) and row["above"]
    assert np.isnan(row["contrast"]) and not row["selective"]  # there is no other language
    assert np.isnan([row["contrast_p"], row["contrast_p_holm"]]).all() and row["p_holm"] == row["p"] == 2 / 201


def tokens_of(texts):
    return np.array([max(len(text.ids) - text.special, 0) for text in texts])


def keys_of(rows):
    """Rows of `ablated`, `hookpoint`, `control`, `top` and, if there is a fifth item, `script`."""
    schema = {"ablated": pl.String, "hookpoint": pl.String, "control": pl.Int32, "top": pl.Int32, "script": pl.Boolean}
    frame = pl.DataFrame([(*row, False)[:5] for row in rows], schema=schema, orient="row")
    return frame.with_row_index("condition").with_columns(pl.col("condition").cast(pl.Int64))


def test_controls_go_on_for_the_languages_that_are_not_decided(tmp_path):
    texts = [tokens.TokenizedText(f"t{i}", (1, 2, 3), 1) for i in range(60)]
    language = ["en", "fi", "sv"] * 20
    keys = [(name, None, None, None) for name in ("en", "fi", "sv")]
    keys += [(name, None, draw, None) for name in ("en", "fi", "sv") for draw in range(4)]
    frame = keys_of(keys)
    what = conditions.Conditions(frame, {"h": [[row] for row in range(len(keys))]})
    asked = what.asked(language, np.full(60, 10), 120)
    # en: far above its controls, and far more selective. fi: as its controls. sv: below them, for certain.
    own, others = {"en": 9.0, "fi": 1.0, "sv": 0.5}, {"en": 0.1, "fi": 1.0, "sv": 4.0}
    noise = torch.rand((len(keys), 60), generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.2
    steps = []

    def measure(some, chosen, pairs, keep):
        steps.append((some.keys["ablated"].to_list(), some.keys["control"].to_list(), keep.name))
        ablated = torch.full(pairs.shape, torch.nan, dtype=torch.float64)
        for row, [number] in enumerate(some.units["h"]):
            name, _, draw, _ = keys[number]
            for column, text in enumerate(chosen):
                at = int(text.text_id[1:])
                size = (own[name] if language[at] == name else others[name]) if draw is None else 1.0
                ablated[row, column] = size + noise[number, at] if pairs[row, column] else torch.nan
        zeros, count = torch.zeros(len(chosen), dtype=torch.float64), torch.full((len(chosen),), 10)
        return ablate.TextNLL(zeros, ablated, count, int(pairs.sum()), 1, 2, ablated / 2, count // 5)

    nll_of, made = run.measure_until_decided(what, texts, language, asked, measure, tmp_path, resamples=200, seed=0)
    assert [step[2] for step in steps] == ["step-0", "step-1", "step-2"]
    assert steps[0][:2] == ([*["en", "fi", "sv"], *["en"] * 2, *["fi"] * 2, *["sv"] * 2], [None] * 3 + [0, 1] * 3)
    assert steps[1][:2] == (["en", "fi", "sv", "fi", "fi"], [None] * 3 + [0, 1])
    assert steps[2][:2] == (["fi", "fi"], [2, 3])
    assert made.keys["control"].drop_nulls().to_list() == [0, 1, 0, 1, 2, 3, 0, 1]
    numbers = [row for [row] in made.units["h"]]
    is_half = np.array([keys[row][0] != "fi" and keys[row][2] is not None for row in numbers])
    wanted = asked[numbers] & ~(is_half[:, None] & ~conditions.first_half(language))
    assert np.array_equal(~nll_of.ablated.isnan().numpy(), wanted) and nll_of.passes == wanted.sum()
    assert nll_of.share == 0.5 and nll_of.tokens.tolist() == [10] * 60
    _, found = statistics.tables(Measured(nll_of, made, "feature", language, ["en", "fi", "sv"], 200, 0))
    assert found.select("above", "draws").rows() == [(True, 2), (False, 4), (False, 2)]
    assert torch.equal(nll_of.kl.isnan(), nll_of.ablated.isnan()) and nll_of.sampled.tolist() == [2] * 60


def test_controls_of_the_script_go_on_for_themselves(tmp_path):
    """The language is far above its controls after one half of the texts, and like those of its script."""
    rows = [
        ("en", None, None, None),
        *(("en", None, draw, None, script) for script in (False, True) for draw in (0, 1)),
    ]
    language, texts = ["en", "fi"] * 20, [tokens.TokenizedText(f"t{i}", (1, 2, 3), 1) for i in range(40)]
    what = conditions.Conditions(keys_of(rows), {"h": [[row] for row in range(len(rows))]})
    noise = torch.rand((len(rows), 40), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    size = torch.tensor([9.0, 1, 1, 9, 9], dtype=torch.float64)[:, None] * torch.tensor([1.0, 0.01] * 20) + noise
    steps = []

    def measure(some, chosen, pairs, keep):
        steps.append(some.keys.select("control", "script").rows())
        columns = [int(text.text_id[1:]) for text in chosen]
        ablated = size[[row for [row] in some.units["h"]]][:, columns].where(pairs, torch.nan)
        zeros, ten = torch.zeros(len(chosen), dtype=torch.float64), torch.full((len(chosen),), 10)
        return ablate.TextNLL(zeros, ablated, ten, 0, 1, 2, ablated, ten)

    asked = what.asked(language, np.full(40, 10), None)
    nll_of, made = run.measure_until_decided(what, texts, language, asked, measure, tmp_path, resamples=200, seed=0)
    own, first, both = [(None, False)], [(0, False), (1, False)], [(0, True), (1, True)]
    assert steps == [own + first + both, own + both]
    done = Measured(nll_of, made, "feature", language, ["en", "fi"], 200, 0)
    found, control = statistics.tables(done)
    assert found["control"].drop_nulls().to_list() == [0, 1]  # no rows of the script's controls
    bound = statistics.compared(done, script=True)
    assert control["above"].to_list() == [True] and bound["above"].to_list() == [False]
    mean = float((size[3:, ::2].sum(1) / 200).mean())
    figures = statistics.against_script(bound)
    assert figures["dnll_control_script/en"] == figures["dnll_control_script"] == pytest.approx(mean)
    assert figures["dnll_control_script_high/en"] > mean and figures["languages_with_script"] == 1
    assert figures["languages_above_script"] == figures["languages_above_script_holm"] == 0
    won = bound.with_columns(above=True, p_holm=pl.lit(0.01))
    assert statistics.against_script(won)["languages_above_script_holm"] == 1
    assert statistics.against_script(bound.clear()) == {}


def test_the_divergence_of_a_language_and_of_others_by_hand():
    rows = [(name, None, draw, None) for draw in (None, 0) for name in ("en", "fi")]
    nan, language = torch.nan, ["en", "fi", "en", "sv"]
    kl = torch.tensor([[1.0, 2, 3, nan], [4, 5, nan, 7], [nan] * 4, [nan] * 4], dtype=torch.float64)
    nll_of = ablate.TextNLL(kl[0], kl, torch.tensor([9] * 4), 0, 0, 0, kl, torch.tensor([1, 2, 4, 3]))
    what = conditions.Conditions(keys_of(rows), {})
    done = Measured(nll_of, what, "feature", language, ["en", "fi"], 100, 0)
    found = statistics.divergence(done)
    expected = {"kl_own/en": 4 / 5, "kl_own/fi": 5 / 2, "kl_own": 1.65, "kl_others/en": 1.0, "kl_others/fi": 11 / 4}
    assert found == pytest.approx(expected | {"kl_others": 1.875})
    nll_of.sampled *= 0
    assert statistics.divergence(done) == {}


def test_few_texts_decide_nothing():
    keys = pl.DataFrame({"condition": [0, 1, 2], "ablated": ["a"] * 3, "control": [None, 0, 1]})
    for count in (4, 5):
        language = ["a"] * count + ["b"] * 5
        change = np.array([[9.0] * count + [0.0] * 5, [0.1] * (count + 5), [0.2] * (count + 5)])
        row = statistics.against_control(change, np.ones(count + 5, dtype=np.int64), language, keys, ["a"], 50, seed=0)
        assert row["decided"].item() == (count == 5) and row["above"].item()


def test_a_cell_is_of_the_texts_on_which_its_condition_was_evaluated():
    nan = np.nan
    ablated = np.array([[2.0, 4.0, 1.0], [2.0, nan, 1.0], [nan, nan, 3.0]])
    found = statistics.cells(np.ones(3), ablated, np.array([1, 3, 2]), ["en", "en", "fi"], 100, 0)
    assert found.filter(evaluated="en").select("condition", "nll", "tokens", "delta").rows() == [
        (-1, 0.5, 4, 0.0), (0, 1.5, 4, 1.0), (1, 1.5, 1, 1.0)]  # fmt: skip
    assert found.filter(evaluated="fi")["delta"].to_list() == [0.0, 0.0, 0.0, 1.0]


def test_the_tables_of_a_run(model, saes):
    texts = make_texts()
    language = ["en" if i % 2 else "fi" for i in range(len(texts))]
    counts = {name: COUNTED.filter(pl.col("unit") < LATENTS) for name in ("layers.1", "layers.2.mlp")}
    owned = OWNED.filter(pl.col("unit") < 50).with_columns(
        hookpoint=pl.col("hookpoint").replace("layers.2", "layers.2.mlp")
    )
    what = conditions.conditions(owned, counts, TOTALS, ["en", "fi"], ratio=0.5, by_layer=True, draws=2, seed=0)
    done = {name: FeatureAblation(saes[name], units) for name, units in what.units.items()}
    nll_of = ablate.ablate(model, done, texts, 40, asked=torch.from_numpy(what.asked(language, tokens_of(texts), None)))
    found, control = statistics.tables(Measured(nll_of, what, "feature", language, ["en", "fi"], 100, 0))
    assert found.columns == [*statistics.COLUMNS, "hookpoint", "layer"]
    assert found["control"].dtype == pl.Int32 and found["layer"].unique().sort().to_list() == [None, 1, 2]
    assert len(found) == 2 + 4 + 2 * 2 + 2 * 4
    assert found.filter(pl.col("control").is_not_null()).select((pl.col("ablated") == pl.col("evaluated")).all()).item()
    assert control["language"].to_list() == ["en", "fi"] and control["method"].unique().to_list() == ["feature"]
    mine = found.filter(pl.col("ablated") == pl.col("evaluated"), pl.col("hookpoint").is_null())
    assert control["own"].to_list() == pytest.approx(mine.filter(pl.col("control").is_null())["delta"].to_list())
    numbers = statistics.figures(found, control, ["en", "fi"])
    own = found.filter(ablated="fi", evaluated="fi").filter(pl.col("hookpoint").is_null(), pl.col("control").is_null())
    assert numbers["dnll_own/fi"] == own["delta"].item()
    known = found.with_columns(low=pl.when(pl.col("ablated") == "fi").then(0.1).otherwise(-0.1))
    assert statistics.figures(known, control, ["en", "fi"])["rows_above_zero"] == 1
    assert {
        "own_alone/layers.1", "others_alone/layers.2.mlp", "control_high/en", "languages_above_control",
        "languages_selective", "languages_above_control_holm", "languages_selective_holm",
    } <= set(numbers)  # fmt: skip


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


def test_cells_are_sums_over_tokens_with_an_interval_around_them():
    clean, count = np.array([10.0, 20.0, 5.0]), np.array([5, 10, 5])
    ablated = np.array([[11.0, 24.0, 5.0], [10.0, 20.0, 5.0]])
    cells = statistics.cells(clean, ablated, count, ["en", "en", "no"], resamples=200, seed=0)
    assert cells.columns == ["condition", "evaluated", "nll", "tokens", "delta", "low", "high"]
    row = cells.row(by_predicate=(pl.col("condition") == 0) & (pl.col("evaluated") == "en"), named=True)
    assert row["nll"] == pytest.approx(35 / 15) and row["delta"] == pytest.approx(5 / 15) and row["tokens"] == 15
    assert row["low"] == pytest.approx(1 / 5) and row["high"] == pytest.approx(4 / 10)
    still = cells.filter(condition=1)
    assert still.select(pl.all_horizontal((pl.col("delta", "low", "high") == 0).all())).item()
    assert cells.filter(condition=-1)["nll"].to_list() == pytest.approx([2.0, 1.0])
    assert cells.equals(statistics.cells(clean, ablated, count, ["en", "en", "no"], resamples=200, seed=0))


def test_bootstrap_interval_has_the_width_of_the_standard_error():
    random = np.random.default_rng(0)
    count = np.full(400, 10)
    change = random.normal(1.0, 2.0, 400)
    cells = statistics.cells(np.zeros(400), change[None], count, ["en"] * 400, resamples=4000, seed=1)
    row = cells.filter(condition=0).row(0, named=True)
    error = change.std() / np.sqrt(400) / 10
    assert (row["high"] - row["low"]) / (2 * 1.96 * error) == pytest.approx(1.0, abs=0.08)


def test_selectivity_by_hand():
    delta = {("a", "a"): 0.5, ("a", "b"): 0.1, ("b", "a"): -0.2, ("b", "b"): 0.05, ("c", "a"): 0, ("c", "b"): 0}
    delta |= {("a", "c"): 0.0, ("b", "c"): 0.3, ("c", "c"): 0.0}
    frame = pl.DataFrame([{"ablated": a, "evaluated": e, "delta": float(v)} for (a, e), v in delta.items()])
    result = statistics.selectivity(frame, ["a", "b", "c"])
    assert result["own"] == pytest.approx(0.55 / 3) and result["others"] == pytest.approx(0.2 / 6)
    assert result["others_abs"] == pytest.approx(0.6 / 6)
    assert result["difference"] == pytest.approx(0.15)
    assert result["ratio"] == pytest.approx(np.exp(0.15))
    assert (result["rows"], result["columns"]) == (1, 1)
    assert result["dnll_own/c"] == 0
