"""Loss recovered on tiny models, against whole passes one text at a time and dictionaries whose answer is known."""

from pathlib import Path

import polars as pl
import pytest
import torch
import transformers
from torch.nn import functional as F  # noqa: N812

from babelscope.core.errors import UserError
from babelscope.models import hookpoints, tokens
from babelscope.models.nll import target_count
from babelscope.quality import loss_recovered as quality
from babelscope.quality import run
from babelscope.quality.loss_recovered import SCHEMA, loss_recovered, splice, zero
from babelscope.sae.autoencoder import SAE

ROOT = Path(__file__).parent.parent
D, VOCABULARY = 16, 60
TINY = {"vocab_size": VOCABULARY, "hidden_size": D, "num_hidden_layers": 4, "num_attention_heads": 4}
LLAMA = {**TINY, "num_key_value_heads": 2, "intermediate_size": 24, "pad_token_id": 0}
FAMILIES = {
    "llama": (transformers.LlamaConfig, LLAMA),
    "gpt2": (transformers.GPT2Config, {"vocab_size": VOCABULARY, "n_embd": D, "n_layer": 4, "n_head": 2}),
    "gemma2": (transformers.Gemma2Config, {**LLAMA, "head_dim": 8, "sliding_window": 4}),
}


def make(family="llama"):
    kind, options = FAMILIES[family]
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(kind(**options)).eval().requires_grad_(False)
    for parameter in model.parameters():  # the usual initialisation is so small that a change would not be seen
        if parameter.dim() > 1:
            parameter.mul_(6)
    return model


def names(model):
    root = "h" if model.config.model_type == "gpt2" else "layers"
    return [f"{root}.2.mlp", f"{root}.0", f"{root}.0.mlp"]


def random_sae(seed, latents=48, k=3):
    g = torch.Generator().manual_seed(seed)
    decoder = F.normalize(torch.randn(latents, D, generator=g), dim=1)
    return SAE(decoder * 0.7, decoder, torch.zeros(latents), torch.randn(D, generator=g) * 0.1, k)


def perfect(weight=None):
    """relu(x) - relu(-x) = x, and `weight @ x` as a transcoder."""
    eye = torch.eye(D if weight is None else weight.shape[1])
    encoder, decoder = torch.cat([eye, -eye]), eye if weight is None else weight.T
    n, b_in = len(encoder), None if weight is None else torch.zeros(len(eye))
    return SAE(
        encoder, torch.cat([decoder, -decoder]), torch.zeros(n), torch.zeros(decoder.shape[1]),
        threshold=torch.zeros(n), b_in=b_in,
    )  # fmt: skip


def silent():
    """Never fires, and its bias is 0."""
    return SAE(torch.eye(D), torch.eye(D), torch.zeros(D), torch.zeros(D), threshold=torch.full((D,), 1e9))


def make_texts(special=1, count=18):
    g = torch.Generator().manual_seed(3)
    ids = [(*(1,) * special, *torch.randint(2, VOCABULARY, (1 + i % 7,), generator=g).tolist()) for i in range(count)]
    return tokens.by_length([tokens.TokenizedText(f"t{i:02d}", text, special) for i, text in enumerate(ids)])


def measure(model, saes, texts, batch_tokens=40, **more):
    language = ["fi" if int(text.text_id[1:]) % 3 else "en" for text in texts]
    return loss_recovered(model, saes, texts, language, ["fi", "en", "sv"], batch_tokens, **more)


def straightforward(model, text, edits):
    """One whole pass over one text without padding."""
    ids = torch.tensor([text.ids])
    with hookpoints.editing(model, edits):
        logits = model(input_ids=ids, use_cache=False).logits
    losses = F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none")
    return losses[max(text.special - 1, 0) :].double().sum().item()


@pytest.mark.parametrize("special", [0, 1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_same_numbers_as_whole_passes_over_one_text_after_the_other(family, special):
    model, texts = make(family), make_texts(special)
    saes = {name: random_sae(seed) for seed, name in enumerate(names(model))}
    found = measure(model, saes, texts)
    assert found.schema == pl.Schema(SCHEMA)
    assert found["hookpoint"].unique(maintain_order=True).to_list() == names(model)
    assert found["language"].to_list() == [None, "fi", "en"] * 3 and found["layer"].to_list() == [2] * 3 + [0] * 6
    for row in found.iter_rows(named=True):
        of = {None: range(3), "fi": (1, 2), "en": (0,)}[row["language"]]
        mine = [text for text in texts if int(text.text_id[1:]) % 3 in of]

        def after(change, special=special):
            return lambda x: torch.cat([x[:, :special], change(x[:, special:])], 1)

        edits = [{}, {row["hookpoint"]: after(saes[row["hookpoint"]])}, {row["hookpoint"]: after(torch.zeros_like)}]
        count = sum(text.content_tokens - (special == 0) for text in mine)
        clean, spliced, zeroed = (sum(straightforward(model, text, edit) for text in mine) / count for edit in edits)
        assert row["tokens"] == count
        nll = [row[key] for key in ("nll_clean", "nll_sae", "nll_zero")]
        assert nll == pytest.approx([clean, spliced, zeroed], abs=1e-5)
        if zeroed > clean:
            assert row["loss_recovered"] == pytest.approx((zeroed - spliced) / (zeroed - clean), abs=1e-3)
        else:
            assert row["loss_recovered"] is None


@pytest.mark.parametrize("family", FAMILIES)
def test_a_perfect_dictionary_recovers_all_and_one_that_gives_0_nothing(family):
    model, texts = make(family), make_texts()
    for sae, as_in, share in ((perfect(), "nll_clean", 1.0), (silent(), "nll_zero", 0.0)):
        found = measure(model, dict.fromkeys(names(model), sae), texts)
        assert found["nll_sae"].to_list() == found[as_in].to_list()
        assert set(found["loss_recovered"].drop_nulls()) == {share}
        assert (found["nll_zero"] - found["nll_clean"]).abs().min() > 1e-3


@pytest.mark.parametrize("name", ["layers.1.mlp.down_proj", "layers.2.self_attn.q_proj", "layers.3.mlp.up_proj"])
def test_a_transcoder_reads_what_enters_the_module(name):
    model = make()
    weight = model.base_model.get_submodule(name).weight
    found = measure(model, {name: perfect(weight)}, make_texts())
    assert found["nll_sae"].to_list() == pytest.approx(found["nll_clean"].to_list(), abs=1e-5)
    wrong = measure(model, {name: perfect(-weight)}, make_texts())
    assert (wrong["nll_sae"] - wrong["nll_clean"]).abs().max() > 1e-3


def test_special_tokens_and_padding_are_left_as_they_are_to_the_bit():
    x = torch.randn(2, 4, D)
    own = torch.tensor([[False, True, True, True], [False, False, True, False]])
    for change in (splice(random_sae(0), own, {}, "layers.1"), zero(own)):
        before, after = x.clone(), change(x)
        assert torch.equal(after[~own], x[~own]) and (after[own] != x[own]).any(1).all()
        assert torch.equal(x, before)  # the clean pass's activations stay whole
    assert torch.equal(splice(random_sae(0), own, {}, "layers.1")(x)[own], random_sae(0)(x[own]))


def test_the_size_of_the_passes_changes_nothing_but_rounding():
    model, texts = make(), make_texts()
    saes = {name: random_sae(seed) for seed, name in enumerate(names(model))}
    small, large = (measure(model, saes, texts, size) for size in (8, 5000))
    for column in ("nll_clean", "nll_sae", "nll_zero"):
        assert small[column].to_list() == pytest.approx(large[column].to_list(), abs=1e-5)
    assert small.select("hookpoint", "language", "tokens").equals(large.select("hookpoint", "language", "tokens"))


def test_where_zeros_cost_nothing_there_is_nothing_to_recover():
    model = make()
    model.model.layers[2].mlp.down_proj.weight.zero_()
    found = measure(model, {"layers.2.mlp": random_sae(0)}, make_texts())
    assert found["nll_zero"].to_list() == found["nll_clean"].to_list()
    assert found["loss_recovered"].null_count() == 3


def test_the_interval_is_over_resamples_of_each_languages_texts():
    """Texts of one language that recover a half and all: the ends are those of a resample with one text only."""
    rows = {
        "clean": [[1.0, 1.0, 0.0]],
        "sae": [[2.0, 1.0, 0.0]],
        "zero": [[3.0, 3.0, 1.0]],
        "tokens": [[1.0, 1.0, 1.0]],
    }
    sums = {key: torch.tensor(value, dtype=torch.float64) for key, value in rows.items()}
    sums |= {key: sums[key][0] for key in ("clean", "tokens")}
    found = quality._frame(sums, ["layers.0"], ["en", "en", "fi"], ["en", "fi"])
    every, en, fi = found.rows(named=True)
    assert (en["loss_recovered"], en["low"], en["high"]) == (0.75, 0.5, 1.0)
    assert (fi["loss_recovered"], fi["low"], fi["high"]) == (1.0, 1.0, 1.0)
    # fi is in every resample, once: 4 of 5 nats, or 3 or 5.
    assert (every["loss_recovered"], every["low"], every["high"]) == pytest.approx((0.8, 0.6, 1.0))


def test_an_interrupted_run_goes_on_from_the_batches_that_it_kept(tmp_path):
    model, texts = make(), make_texts()
    saes = {name: random_sae(seed) for seed, name in enumerate(names(model))}
    whole = measure(model, saes, texts, keep=tmp_path)
    kept = sorted(tmp_path.iterdir())
    assert len(kept) > 2 and sum(map(target_count, texts)) == whole["tokens"][0]
    kept[1].unlink()
    passes = []
    handle = model.lm_head.register_forward_pre_hook(lambda *_: passes.append(1))
    again = measure(model, saes, texts, keep=tmp_path)
    handle.remove()
    assert again.equals(whole) and len(passes) == 1 + 2 * len(saes)


def test_texts_without_a_target_token_and_models_left_as_they_were():
    model = make()
    alone = [tokens.TokenizedText("t00", (1,), 1), tokens.TokenizedText("t01", (1, 8), 1)]
    saes = {
        "layers.1.mlp": random_sae(0),
        "layers.2.mlp.down_proj": perfect(model.model.layers[2].mlp.down_proj.weight),
    }
    before = list(hookpoints.blocks(model))
    for size in (1, 8):
        found = measure(model, saes, alone, size)
        assert found["language"].to_list() == [None, "fi"] * 2 and found["tokens"].to_list() == [1] * 4
    assert all(a is b for a, b in zip(before, hookpoints.blocks(model), strict=True))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_an_unknown_hookpoint_is_refused_before_any_work():
    with pytest.raises(UserError, match=r"hookpoints: the model has no 'layers\.9\.mlp'"):
        measure(make(), {"layers.9.mlp": random_sae(0)}, make_texts())


def test_the_figures_of_the_stage():
    rows = [
        ("layers.1", 1, None, 30, 2.0, 2.5, 4.0, 0.75, 0.7, 0.8),
        ("layers.1", 1, "en", 10, 1.0, 1.0, 2.0, 1.0, 0.9, 1.1),
        ("layers.1", 1, "fi", 20, 2.5, 2.6, 2.5, None, None, None),
        ("layers.2.mlp", 2, None, 30, 2.0, 5.0, 4.0, -0.5, None, None),
    ]
    found = pl.DataFrame(rows, schema=SCHEMA, orient="row")
    assert run.figures(found) == {
        "loss_recovered/layers.1": 0.75,
        "loss_recovered/layers.1/en": 1.0,
        "loss_recovered/layers.2.mlp": -0.5,
        "loss_recovered_low/layers.1": 0.7,
        "loss_recovered_high/layers.1": 0.8,
        "nll_clean": 2.0,
    }
    run.report(found)
