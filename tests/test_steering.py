"""Steering on a tiny model: generation, vectors, and what is made of the answers."""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch
import transformers
from closure import ROOT
from test_neurons_stages import tokenizer

from babelscope import config
from babelscope.core.errors import UserError
from babelscope.core.files import write_json
from babelscope.models import hookpoints as hooks
from babelscope.models.tokens import TokenizedText
from babelscope.models.top_tokens import TopTokens
from babelscope.sae.autoencoder import SAE
from babelscope.steering import development, generation, judge, prompts, removal, statistics, vectors
from babelscope.steering.answers import ROWS, Answers
from babelscope.steering.run import hookpoints_of


def build(vocabulary: int = 60):
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24
    )
    return transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def model():
    return build()


# Of different lengths, and one twice.
PROMPTS = [(3, 4, 5, 9), (6, 7, 8), (3, 4, 5, 9)]


def generate(model, prompts, edits, new_tokens=6, temperature=0.0, seed=0):
    return generation.generate(
        TopTokens(model), prompts, edits, special=1, new_tokens=new_tokens, temperature=[temperature] * len(prompts),
        seeds=[[seed, row] for row in range(len(prompts))],
    )  # fmt: skip


def test_cached_and_batched_generation_is_that_of_whole_passes_one_by_one(model):
    added = torch.randn(3, 16, generator=torch.Generator().manual_seed(0)) * 3
    added[0] = 0
    removed = torch.nn.functional.normalize(torch.tensor([[1.0, 2.0] + [0.0] * 14] * 3), dim=1)
    found = generate(model, PROMPTS, {"layers.1": generation.Change(added, removed)})
    for row in range(3):
        ids = list(PROMPTS[row])
        first = 1  # the special token stays as it is
        for _ in range(6):

            def change(_module, _inputs, output, row=row, first=first):
                output = output.clone()
                x = output[:, first:]
                x -= (x @ removed[row]).clamp_min(0).unsqueeze(-1) * removed[row]
                x += added[row]
                return output

            handle = model.model.layers[1].register_forward_hook(change)
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
            handle.remove()
            logits[model.generation_config.eos_token_id] = -torch.inf  # the end is not generated
            ids.append(int(logits.argmax()))
        assert found[row].tolist() == ids[len(PROMPTS[row]) :]
    assert found[0].tolist() != found[2].tolist()


@pytest.mark.parametrize("place", ["layers.1", "layers.2.mlp", "layers.2.input"])
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_equal_prompts_share_the_blocks_below_the_change(kind, place, monkeypatch):
    torch.manual_seed(2)
    sizes = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
             "num_key_value_heads": 1, "intermediate_size": 24, "head_dim": 8}  # fmt: skip
    config = {
        "llama": transformers.LlamaConfig(**sizes),
        # Prompts longer than the window, in blocks below and above the change.
        "gemma3": transformers.Gemma3TextConfig(**sizes, sliding_window=3, layer_types=[
            "sliding_attention", "full_attention", "sliding_attention"]),
    }[kind]  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    prompts, seen = [(3, 4, 5, 9, 8, 7), (6, 7, 8)] * 3, []
    changes = {place: generation.Change(torch.randn(6, 16) * 3)}
    run_blocks = generation.hooks.run_blocks
    monkeypatch.setattr(generation.hooks, "run_blocks", lambda *a, **k: seen.append(a[1]) or run_blocks(*a, **k))
    shared = generate(model, prompts, changes)
    assert seen == [range(2 if place == "layers.2.mlp" else 1)]
    monkeypatch.setattr(generation, "_restarts", lambda *_: False)
    assert shared.tolist() == generate(model, prompts, changes).tolist() and len(seen) == 1
    assert len({tuple(row) for row in shared.tolist()}) > 2


def test_sampling_depends_on_the_seed_only_and_leaves_the_global_one(model):
    state = torch.random.get_rng_state()
    a, b, c = (generate(model, PROMPTS, {}, 8, 1.0, seed) for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(state, torch.random.get_rng_state())


def test_the_models_own_generation_config_changes_nothing(model, monkeypatch):
    plain = generate(model, PROMPTS, {}, 8)
    own = transformers.GenerationConfig(eos_token_id=model.generation_config.eos_token_id, repetition_penalty=5.0)
    monkeypatch.setattr(model, "generation_config", own)
    assert torch.equal(plain, generate(model, PROMPTS, {}, 8))


@pytest.mark.parametrize("end", [0, [0, 7]])
def test_an_end_of_text_token_with_number_0_is_never_generated(end, monkeypatch):
    model = build()
    state = model.model(input_ids=torch.tensor([PROMPTS[0]])).last_hidden_state[0, -1]
    model.lm_head.weight[0] = state  # the most probable token
    monkeypatch.setattr(model, "generation_config", transformers.GenerationConfig(eos_token_id=None))
    assert generate(model, PROMPTS, {})[0, 0] == 0
    monkeypatch.setattr(model, "generation_config", transformers.GenerationConfig(eos_token_id=end))
    assert not (generate(model, PROMPTS, {}) == 0).any()


def test_tokens_are_drawn_by_their_probability():
    logits = torch.tensor([2.0, 1.0, 0.0, -torch.inf]).expand(20_000, 4)
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    drawn = generation._pick(logits, uniform, torch.full((20_000,), 0.5))
    wanted = (logits[0] / 0.5).softmax(0)
    torch.testing.assert_close(torch.bincount(drawn, minlength=4) / 20_000, wanted, atol=0.01, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_screened_vocabulary_gives_the_largest_logits(dtype):
    model = build(3 * 4096).to(dtype)
    top = TopTokens(model)
    assert top.codes is not None
    ids = torch.randint(5, 3000, (8, 4), generator=torch.Generator().manual_seed(0))
    logits, tokens = top([5] * 8, input_ids=ids, use_cache=False)
    whole = model(input_ids=ids, use_cache=False).logits[:, -1].float()
    torch.testing.assert_close(logits, whole.gather(1, tokens), atol=1e-5 if dtype == torch.float32 else 0.02, rtol=0)
    if dtype == torch.float32:
        assert torch.equal(tokens, whole.topk(5, dim=1).indices)
    assert (whole.amax(1) - whole.gather(1, tokens[:, :1])[:, 0] <= (0 if dtype == torch.float32 else 0.01)).all()


def test_each_row_gets_as_many_as_it_asks_for_and_depends_on_no_other():
    model = build(3 * 4096)
    ids = torch.randint(5, 3000, (8, 4), generator=torch.Generator().manual_seed(1))
    wanted = [64, 1, 1, 64, 2, 2, 1, 64]
    logits, tokens = TopTokens(model)(wanted, input_ids=ids, use_cache=False)
    whole = model(input_ids=ids, use_cache=False).logits[:, -1].topk(64, dim=1)
    for row, count in enumerate(wanted):
        assert torch.equal(tokens[row, :count], whole.indices[row, :count])
        torch.testing.assert_close(logits[row, :count], whole.values[row, :count], atol=1e-5, rtol=0)
        assert count == 64 or logits[row, count:].isneginf().all()


def test_large_dimensions_do_not_hide_the_others_from_the_screen():
    model = build(3 * 4096)
    with torch.no_grad():
        model.model.norm.weight[0] = 500  # its weights differ little: this dimension decides nothing
        model.lm_head.weight[:, 0] = 0.02
    ids = torch.randint(5, 3000, (64, 4), generator=torch.Generator().manual_seed(0))
    _, tokens = TopTokens(model)([1] * 64, input_ids=ids, use_cache=False)
    assert torch.equal(tokens[:, 0], model(input_ids=ids, use_cache=False).logits[:, -1].argmax(1))


def test_fluency_by_hand(model):
    generated = torch.tensor([[9, 9, 9, 9], [9, 8, 7, 6], [1, 2, 1, 2]])
    assert generation.distinct_2(generated) == pytest.approx([1 / 3, 1.0, 2 / 3])
    nll = generation.continuation_nll(model, PROMPTS, generated)
    logp = model(input_ids=torch.tensor([[*PROMPTS[1], 9, 8, 7, 6]]), use_cache=False).logits.log_softmax(-1)[0]
    by_hand = -sum(logp[2 + i, generated[1, i]] for i in range(4)) / 4
    assert nll[1].item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_a_model_without_keys_and_values_is_refused():
    config = transformers.MambaConfig(vocab_size=30, hidden_size=8, num_hidden_layers=1, state_size=4)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(UserError, match=r"model\.name: MambaForCausalLM keeps no keys and values"):
        generate(model, [(3, 4)], {})


def test_directions_by_hand():
    rows = torch.tensor([[2.0, 0.0], [4.0, 0.0], [0.0, 1.0], [0.0, 3.0], [-3.0, 0.0]])
    codes = torch.tensor([0, 0, 1, 1, 2])
    # The means are (3, 0), (0, 2), (-3, 0); that of the others of the first is (-1.5, 1).
    assert vectors.directions("diffmean", rows, codes, 3).tolist() == [[4.5, -1.0], [0.0, 2.0], [-4.5, -1.0]]
    pca = vectors.directions("pca", rows, codes, 3)
    away = rows[:2] - torch.tensor([-1.5, 1.0])
    first = torch.linalg.svd(away).Vh[0]
    assert abs(pca[0] @ first).item() == pytest.approx(1, abs=1e-5) and pca[0] @ torch.tensor([4.5, -1.0]) > 0
    # Within the languages: variances 2/5 along both axes, no covariance; both get a tenth of 2/5 more.
    probe = vectors.directions("probe", rows, codes, 3)
    torch.testing.assert_close(probe, vectors.directions("diffmean", rows, codes, 3) / (0.4 * 1.1))
    scaled = vectors.as_long_as(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    torch.testing.assert_close(scaled, torch.tensor([[0.6, 0.8], [0.0, 0.0]]))


def test_vectors_of_latents_by_hand():
    decoder = torch.arange(12.0).view(4, 3)
    dictionary = SAE(decoder, decoder, torch.zeros(4), torch.zeros(3), 2)
    assert torch.equal(vectors.of_features(dictionary, [3, 1], [2.0, 0.5]), 2 * decoder[3] + 0.5 * decoder[1])
    counts = pl.DataFrame({"unit": [1, 1, 3], "language": ["a", "b", "b"], "sum": [4.0, 2.0, 6.0]})
    totals = pl.DataFrame({"language": ["a", "b"], "tokens": [2, 4]})
    mean = vectors.mean_activations(counts, totals)  # a: 2 of latent 1; b: 0.5 of latent 1, 1.5 of latent 3
    difference = 1.5 * decoder[1] - 1.5 * decoder[3]
    torch.testing.assert_close(
        vectors.sae_diffmean(dictionary, mean, ["a", "b"]), torch.stack([difference, -difference])
    )


def test_features_are_taken_by_causal_rank_if_there_is_one():
    features = pl.DataFrame({"hookpoint": "h", "unit": [5, 6, 7], "language": "de", "rank": [1, 2, 3]})
    assert vectors.ranked(features, None)["unit"].to_list() == [5, 6, 7]
    effects = features.head(2).with_columns(causal_rank=pl.Series([2, 1]))
    assert vectors.ranked(features, effects)["unit"].to_list() == [6, 5, 7]


def test_vectors_are_read_as_they_were_written(tmp_path):
    written = {"diffmean": {"layers.1": {"pt-BR": torch.tensor([1.0, 2.0])}, "layers.2": {"pt-BR": torch.ones(2)}}}
    vectors.write(tmp_path, written)
    found = vectors.read(tmp_path / "diffmean.safetensors")
    assert found.keys() == {"layers.1", "layers.2"} and found["layers.1"]["pt-BR"].tolist() == [1.0, 2.0]
    assert vectors.place_of("layers.12.post_feedforward_layernorm") == "layers.12" == vectors.place_of("layers.12")
    assert vectors.place_of("layers.12.input") == "layers.12.input"  # before the block


def test_prompts_end_in_a_line_break_and_begin_with_special_tokens(monkeypatch):
    monkeypatch.setattr(prompts, "content_ids", lambda _, texts: [[42] if text == "\n" else [7] for text in texts])
    rows = [("a", "en", "1", "5 6 7 8"), ("b", "en", "2", "5 6 7 9"), ("c", "en", "3", "5"), ("d", "de", "1", "4 4")]
    texts = pl.DataFrame(rows, schema=["text_id", "language", "group", "text"], orient="row")
    lines = prompts.Lines(tokenizer, 3)
    assert prompts.Lines(tokenizer, 3, 2).prompts(texts)[0].ids == (1, 5, 6, 7, 42, 5, 6, 7, 42)
    found = prompts.choose(lines, texts, ["en", "de"], 1)
    assert [prompt.ids for prompt in found["en"]] == [(1, 5, 6, 7, 42)] and found["de"][0].content == (4, 4)
    assert lines.after(found["en"][0], ["x", "y"]) == (1, 7, 42, 7, 42, 5, 6, 7, 42)
    assert prompts.example(texts, "en", "de", set()) == ["5 6 7 8", "4 4"]
    assert prompts.example(texts, "en", "de", {"1"}) == []
    with pytest.raises(UserError, match=r"steer\.prompts: 2 prompts in 'de' wanted; there are 1"):
        prompts.choose(lines, texts, ["de"], 2)
    with pytest.raises(UserError, match=r"corpus\.train_tokens: 6 prompts in 'de' wanted; there are 1"):
        prompts.choose(lines, texts, ["de"], 6, "corpus.train_tokens")


def test_relevance_by_hand():
    pool = judge.pools([2, 3])
    assert pool.tolist() == [[0, 1], [1, 0], [2, 3], [3, 4], [4, 2]]
    asked = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    answers = torch.tensor([[5.0, 1.0], [1.0, 5.0], [1.0, -9.0]])
    assert judge.relevant(answers, asked, torch.tensor([0, 0, 4]), pool).tolist() == [True, False, False]
    mean = {"a": torch.tensor([1.0, 1.0]), "b": torch.tensor([3.0, 1.0])}
    assert judge.centred(torch.zeros(2, 2), ["b", None], mean).tolist() == [[-3.0, -1.0], [-2.0, -1.0]]


def test_embeddings_are_the_means_of_the_states_of_content_tokens(model):
    found = judge.embed(model, "layers.1", [[5, 6], [7, 8, 9]], [1], 100)
    states = hooks.read(model, ["layers.1"], input_ids=torch.tensor([[1, 7, 8, 9]]))["layers.1"][0, 1:]
    torch.testing.assert_close(found[1], states.mean(0), atol=1e-5, rtol=0)
    assert judge.encoder_place(model, "layers.0") == "layers.1" == judge.encoder_place(model, "layers.0.input")


def test_the_vector_of_the_prompts_language_is_taken_off():
    of = {"m": {"layers.1": {"de": torch.tensor([3.0, 1.0]), "en": torch.tensor([1.0, 0.0])}}}
    asked = [prompts.Prompt(name, "g", (1,), (5,), (1, 5)) for name in ("en", "fi")]
    model = torch.nn.Linear(1, 1)
    found = Answers(SimpleNamespace(model=model), None, of, asked, None, 2, 2, 2, 0, None)
    rows = [("m", "de", "layers.1", 2.0, 0, prompt, 0.0) for prompt in (0, 1)] + [("n", "de", None, None, 0, 0, 0.0)]
    added = found._added(pl.DataFrame(rows, schema=ROWS, orient="row"))
    # No vector of Finnish is known.
    assert added["layers.1"].tolist() == [[4.0, 2.0], [6.0, 2.0], [0.0, 0.0]]
    params = config.load(ROOT / "params.yaml")
    for chosen, wanted in ((None, params.hookpoints[3:4]), ([], params.hookpoints), (["x"], ["x"])):
        section = params.steer.model_copy(update={"hookpoints": chosen})
        assert hookpoints_of(params.model_copy(update={"steer": section})) == wanted


def test_development_halves_the_settings():
    settings = [("a", 1.0, (1, 1)), ("a", 2.0, (0, 1)), ("a", 3.0, (0, 0)), ("b", 1.0, (0, 1))]
    rows = [("m", "de", place, strength, slot, hit, True, 1.0)
            for place, strength, hits in settings for slot, hit in enumerate(hits)]  # fmt: skip
    names = ["method", "language", "place", "strength", "slot", "forced", "relevant", "distinct_2"]
    table = development.scores(pl.DataFrame(rows, schema=names, orient="row").with_columns(pl.col("forced") == 1))
    # Both of two forced: (2 + 0.5) / 3 = 5/6; all are relevant.
    assert table["score"].to_list() == pytest.approx(
        [5 / 6, 2 * 0.5 * (5 / 6) / (0.5 + 5 / 6), 2 / 6 * (5 / 6), 0.625], abs=0.05
    )
    tried = development.settings(table).select("place", "strength").rows()
    assert tried == [("a", 1.0), ("a", 2.0), ("b", 1.0), ("a", 3.0)] or tried[0] == ("a", 1.0)
    assert development.best(table, 1)["strength"].to_list() == [1.0]
    # The second language has a vector at b only, and a setting counts with all languages.
    more = pl.concat([table, table.filter(place="b").with_columns(language=pl.lit("fi"), score=0.9)])
    assert development.settings(more)["score"][0] == pytest.approx((0.625 + 0.9) / 2)
    assert development.best(more, 1).select("language", "place").rows() == [("de", "b"), ("fi", "b")]


def test_figures_and_verdict_by_hand():
    rows = [(method, language, slot, forced, relevant, 0.9, 2.0)
            for method, forced, relevant in (("diffmean", True, True), ("features", False, True))
            for language in ("de", "fi", "ja") for slot in range(4)]  # fmt: skip
    rows[0] = ("diffmean", "de", 0, False, True, 0.9, None)
    rows[4] = ("diffmean", "fi", 0, False, True, 0.9, 2.0)
    names = ["method", "language", "slot", "forced", "relevant", "distinct_2", "nll"]
    frame = pl.DataFrame(rows, schema=names, orient="row")
    numbers = statistics.figures(
        frame, ["diffmean", "features"], ["de", "fi", "ja"], ["de"], "features", slots=4, resamples=50, seed=0
    )
    assert numbers["diffmean/harmonic/de"] == numbers["diffmean/harmonic/fi"] == pytest.approx(2 * 0.75 / 1.75)
    # German, a language of the prompts, is in no mean.
    assert numbers["harmonic/diffmean"] == pytest.approx((2 * 0.75 / 1.75 + 1) / 2) == numbers["best_harmonic"]
    assert numbers["forcing/diffmean"] == pytest.approx(0.875) and numbers["harmonic/features"] == 0
    assert numbers["features_minus_diffmean"] == pytest.approx(-numbers["harmonic/diffmean"])
    prompted = frame.filter(method="features").with_columns(method=pl.lit("prompt"), forced=pl.lit(True))
    both = statistics.figures(
        pl.concat([frame, prompted]), ["diffmean", "prompt"], ["de", "fi", "ja"], ["de"], None,
        slots=4, resamples=5, seed=0,
    )  # fmt: skip
    assert both["harmonic/prompt"] == 1 and both["best"] == "diffmean"  # the best of the vectors
    assert numbers["verdict"] == "worse" and numbers["best"] == "diffmean" and numbers["nll/diffmean"] == 2.0
    low, high = numbers["harmonic_low/diffmean"], numbers["harmonic_high/diffmean"]
    assert low < numbers["harmonic/diffmean"] < high == 1.0
    assert statistics.harmonic(np.array([0.0, 1.0]), np.array([0.0, 0.5])).tolist() == [0.0, pytest.approx(2 / 3)]


def test_the_feature_method_is_that_of_the_best_sum_over_the_languages():
    rows = [("features", "fi", 0.5), ("features", "ja", 0.5), ("features-1", "fi", 0.9), ("features-5", "de", 5.0),
            ("pca", "fi", 1.0)]  # fmt: skip
    chosen = pl.DataFrame(rows, schema=["method", "language", "score"], orient="row")
    # features-1 has a vector in one language only, and German is a language of the prompts.
    assert statistics.pick(chosen, ["de"]) == "features" and statistics.pick(chosen.tail(1), ["de"]) is None


def test_the_means_do_not_depend_on_the_order_of_groups():
    names = [f"l{number}" for number in range(13)]
    nll = np.random.default_rng(0).random(len(names)).tolist()
    rows = [("m", name, 0, True, True, 1.0, value) for name, value in zip(names, nll, strict=True)]
    schema = ["method", "language", "slot", "forced", "relevant", "distinct_2", "nll"]
    frame = pl.DataFrame(rows, schema=schema, orient="row")
    found = {statistics.figures(frame, ["m"], names, [], None, slots=1, resamples=2, seed=0)["nll/m"]
             for _ in range(50)}  # fmt: skip
    assert len(found) == 1


def test_the_lines_of_the_page_steer_as_the_stage_does(model, tmp_path, monkeypatch):
    [block] = re.findall(r"```python\n(.*?)```", (ROOT / "docs/steering.md").read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    difference, wrong = torch.randn(16, generator=torch.Generator().manual_seed(3)) * 2, torch.arange(16.0)
    table = {"de": difference + wrong, "en": wrong}
    vectors.write(Path("data/vectors"), {"diffmean": {"layers.1": table}})
    write_json(Path("data/vectors/settings.json"), {"diffmean": {"de": {"hookpoint": "layers.1", "strength": 1.5}}})
    ids = torch.tensor([PROMPTS[0]])
    names = {"model": model, "prompt": "p", "tokenizer": lambda *_, **__: {"input_ids": ids}}
    exec(block, names)  # noqa: S102
    edits = {"layers.1": generation.Change(1.5 * (table["de"] - wrong).unsqueeze(0))}
    wanted = generate(model, PROMPTS[:1], edits, 10)[0].tolist()
    found = names["answer"][0, len(PROMPTS[0]) :].tolist()
    assert found == wanted[: len(found)] and found != generate(model, PROMPTS[:1], {}, 10)[0].tolist()[: len(found)]


def test_removal_lowers_a_component_to_the_level_and_raises_none():
    change = generation.Change(removed=torch.tensor([[1.0, 0.0]]), level=0.5)
    states = torch.tensor([[[2.0, 3.0], [0.25, 3.0], [-1.0, 3.0]]])
    assert change(states).tolist() == [[[0.5, 3.0], [0.25, 3.0], [-1.0, 3.0]]]


def test_removal_measures_the_passes_and_the_cost(model, monkeypatch):
    class Lid:
        def predict(self, texts):
            return pl.DataFrame({"predicted": ["en" if "a" in text else "ru" for text in texts]})

    rows = [("1", "en", "train", "1", "5 6"), ("2", "ru", "train", "2", "7 8"), ("3", "ru", "eval", "3", "9 9"),
            ("4", "en", "eval", "4", "9 8")]  # fmt: skip
    corpus = pl.DataFrame(rows, schema=["text_id", "language", "split", "group", "text"], orient="row")
    monkeypatch.setattr(prompts, "content_ids", lambda _, texts: [[4]] * len(texts))
    lines = prompts.Lines(tokenizer, 5)
    directions = removal.directions(
        {"diffmean": {"layers.1": {"en": torch.tensor([2.0] + [0.0] * 15)}}},
        pl.DataFrame({"method": ["diffmean"], "place": ["layers.1"]}), "en", {"layers.1": torch.full((16,), -9.0)},
    )  # fmt: skip
    assert directions["none"] is None and directions["diffmean"].unit[0] == 1 and directions["diffmean"].level == -9
    seen = []

    def answer(_top, ids, special, direction, new_tokens, rows):
        seen.append((ids, special, new_tokens, rows))
        return ["a b" if direction is None else "б"]

    monkeypatch.setattr(removal, "_answers", answer)
    monkeypatch.setattr(tokenizer, "batch_decode", lambda rows, skip_special_tokens: rows, raising=False)
    monkeypatch.setattr(removal, "_latin", lambda _: {"ru": 0.0, "en": 1.0})
    texts = {name: [TokenizedText(name, (1, 5, 6, 7), 1)] for name in ("en", "ru")}
    table = removal.measure(
        TopTokens(model), Lid(), {"en": "en", "ru": "ru"}, lines, corpus, "en", directions, prompts=2, new_tokens=3,
        texts=texts, batch_tokens=64, batch_rows=5,
    )  # fmt: skip
    numbers = removal.figures(table, "en")
    assert seen[0] == ([(1, 4, 4, 9, 9, 4)], 1, 3, 5) and table.filter(language="en")["line_pass"].null_count() == 2
    assert numbers["removal/none/line_pass"] == 0 and numbers["removal/none/in_removed"] == 1
    assert numbers["removal/diffmean/line_pass"] == 1 == numbers["removal/diffmean/word_pass"]
    plain = model(input_ids=torch.tensor([[1, 5, 6, 7]])).logits[0].log_softmax(-1)
    by_hand = -sum(plain[i, token] for i, token in enumerate((5, 6, 7))) / 3
    assert numbers["removal/none/nll"] == pytest.approx(by_hand.item(), rel=1e-4)
    assert numbers["removal/diffmean/nll"] != pytest.approx(by_hand.item(), rel=1e-4)


def test_prompts_longer_than_the_models_positions_are_refused():
    config = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=20, n_positions=8)
    small = transformers.AutoModelForCausalLM.from_config(config)
    prompt = prompts.Prompt("en", "1", (1,), (3, 4), (1, 3, 4, 5, 3, 4, 5))
    prompts.check_fits(small, [prompt], 1)
    with pytest.raises(UserError, match=r"steer\.prompt_tokens: a prompt and its answer have 9 tokens .* 8 positions"):
        prompts.check_fits(small, [prompt], 2)
