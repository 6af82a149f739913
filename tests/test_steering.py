"""Steering on a tiny model, and what is made of the generated texts."""

import polars as pl
import pytest
import torch
import transformers
from closure import ROOT
from test_neurons_stages import tokenizer

from babelscope import config
from babelscope.core.paths import Paths
from babelscope.sae.autoencoder import SAE
from babelscope.steering import generation, run, success


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24
    )
    return transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


PROMPTS = torch.tensor([[3, 4, 5], [6, 7, 8], [3, 4, 5]])


def test_direction_is_the_weighted_sum_of_decoder_rows():
    decoder = torch.arange(12.0).view(4, 3)
    dictionary = SAE(decoder, decoder, torch.zeros(4), torch.zeros(3), 2)
    assert torch.equal(generation.direction(dictionary, [3, 1], [2.0, 0.5]), 2 * decoder[3] + 0.5 * decoder[1])


def test_cached_and_batched_generation_is_that_of_whole_passes_one_by_one(model):
    added = {"layers.1.mlp": torch.randn(3, 16, generator=torch.Generator().manual_seed(0)) * 3}
    added["layers.1.mlp"][0] = 0
    found = generation.generate(model, PROMPTS, added, new_tokens=6, temperature=0.0, seed=0)
    for row in range(3):
        ids = PROMPTS[row].tolist()
        for _ in range(6):

            def change(_module, _inputs, output, row=row):
                output = output.clone()
                output[:, 1:] += added["layers.1.mlp"][row]
                return output

            handle = model.model.layers[1].mlp.register_forward_hook(change)
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
            handle.remove()
            logits[model.generation_config.eos_token_id] = -torch.inf  # the end is not generated
            ids.append(int(logits.argmax()))
        assert found[row].tolist() == ids[3:]
    assert found[0].tolist() != found[2].tolist()


def test_sampling_depends_on_the_seed_only_and_leaves_the_global_one(model):
    state = torch.random.get_rng_state()
    a, b, c = (generation.generate(model, PROMPTS, {}, new_tokens=8, temperature=1.0, seed=s) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "theirs",
    [
        {"repetition_penalty": 5.0}, {"no_repeat_ngram_size": 1}, {"suppress_tokens": list(range(3, 50))},
        {"bad_words_ids": [[i] for i in range(3, 50)]}, {"do_sample": True, "min_p": 0.9, "top_k": 2, "top_p": 0.1},
        {"num_beams": 3}, {"sequence_bias": [[[7], 50.0]]}, {"forced_eos_token_id": 9},
    ],
    ids=lambda one: next(iter(one)),
)  # fmt: skip
def test_the_models_own_generation_config_changes_nothing(model, monkeypatch, theirs, temperature):
    plain = generation.generate(model, PROMPTS, {}, new_tokens=8, temperature=temperature, seed=0)
    own = transformers.GenerationConfig(eos_token_id=model.generation_config.eos_token_id, **theirs)
    monkeypatch.setattr(model, "generation_config", own)
    assert torch.equal(plain, generation.generate(model, PROMPTS, {}, new_tokens=8, temperature=temperature, seed=0))
    assert model.generation_config is own


def test_what_is_drawn_for_a_row_does_not_depend_on_its_batch(model):
    how = {"new_tokens": 8, "temperature": 0.7, "seed": 3}
    prompts = torch.cat([PROMPTS] * 3)
    whole = generation.generate(model, prompts, {}, **how)
    for size in (1, 2, 4):
        starts = range(0, 9, size)
        parts = [generation.generate(model, prompts[at : at + size], {}, first_row=at, **how) for at in starts]
        assert torch.equal(torch.cat(parts), whole)
    assert whole[0].tolist() != whole[3].tolist()  # the same prompt in another row


def test_tokens_are_drawn_by_their_probability():
    logits = torch.tensor([2.0, 1.0, 0.0, -torch.inf]).expand(20_000, 4)
    drawn = generation._pick(logits, torch.rand(20_000, generator=torch.Generator().manual_seed(0)), 0.5)
    wanted = (logits[0] / 0.5).softmax(0)
    torch.testing.assert_close(torch.bincount(drawn, minlength=4) / 20_000, wanted, atol=0.01, rtol=0)


def test_special_tokens_are_in_the_prompt_and_stay_as_they_are(model, tmp_path, monkeypatch):
    rows = [("a", "en", "eval", "5 6 7 8"), ("b", "en", "eval", "5 6 7 9"), ("c", "en", "eval", "5"),
            ("d", "en", "eval", "8 9 5"), ("e", "de", "eval", "4 4 4"), ("f", "en", "train", "3 3 3")]  # fmt: skip
    (tmp_path / "data/corpus").mkdir(parents=True)
    pl.DataFrame(rows, schema=["text_id", "language", "split", "text"], orient="row").write_parquet(
        tmp_path / "data/corpus/texts.parquet"
    )
    monkeypatch.chdir(tmp_path)
    params = config.load(ROOT / "params.yaml")
    params = params.model_copy(
        update={"steer": params.steer.model_copy(update={"prompts": 2, "prompt_tokens": 3, "prompt_language": "en"})}
    )
    assert run.first_tokens(tokenizer, params, Paths()) == [[1, 5, 6, 7], [1, 8, 9, 5]]

    x = torch.zeros(1, 4, 2)
    added = torch.ones(1, 2)
    assert generation.add(added, 2)(x)[0, :, 0].tolist() == [0, 0, 1, 1]
    assert generation.add(added, 2)(x[:, :1])[0, :, 0].tolist() == [1]  # a later pass, over one token
    seen = []
    monkeypatch.setattr(generation, "add", lambda vectors, special: seen.append(special) or (lambda y: y))
    for special in (0, 1, 2):
        added = {"layers.1.mlp": torch.ones(3, 16)}
        generation.generate(model, PROMPTS, added, new_tokens=2, temperature=0.0, seed=0, special=special)
    assert seen == [1, 1, 2]


def test_fluency_by_hand(model):
    generated = torch.tensor([[9, 9, 9, 9], [9, 8, 7, 6], [1, 2, 1, 2]])
    nll, distinct = generation.fluency(model, PROMPTS, generated)
    assert distinct.tolist() == pytest.approx([1 / 3, 1.0, 2 / 3])
    logp = model(input_ids=torch.cat([PROMPTS, generated], 1), use_cache=False).logits.log_softmax(-1)
    by_hand = -sum(logp[1, 2 + i, generated[1, i]] for i in range(4)) / 4
    assert nll[1].item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_judgement_and_figures_by_hand():
    rows = [  # language, strength, control, predicted, nll, distinct-2
        (None, 0.0, None, "en", 2.0, 1.0), (None, 0.0, None, "fi", 2.0, 1.0),
        ("fi", 1.0, None, "fi", 3.0, 0.2), ("fi", 1.0, None, "en", 3.0, 0.9),
        ("fi", 2.0, None, "fi", 5.0, 0.9), ("fi", 2.0, None, "fi", 9.0, 0.9),
        ("fi", 2.0, 1, "en", 4.0, 0.9), ("fi", 2.0, 1, "en", 4.0, 0.9),
        ("xx", 1.0, None, "en", 4.0, 0.9),
    ]  # fmt: skip
    names = {"language": pl.String, "strength": pl.Float64, "control": pl.Int32}
    frame = pl.DataFrame(
        rows, schema=names | {"predicted": pl.String, "nll": pl.Float64, "distinct_2": pl.Float64}, orient="row"
    )
    judged = success.judge(frame, {"fi": "fi"}, 0.5, 6.0)
    assert judged["success"].to_list() == [None, None, False, False, True, False, False, False, None]
    numbers = success.figures(judged, {"fi": "fi"}, 0.5, 6.0)
    assert numbers["strength/fi"] == 2.0 and numbers["success/fi"] == 0.5 and numbers["called/fi"] == 1.0
    assert numbers["nll/fi"] == 7.0 and numbers["success_unsteered/fi"] == 0.5 and numbers["success_control/fi"] == 0
    assert numbers["success_at/1"] == 0.0 and numbers["success_at/2"] == 0.5 and "success/xx" not in numbers
