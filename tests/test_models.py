"""Hookpoints on tiny randomly initialised models of several families."""

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from babelscope.errors import UserError
from babelscope.models import hookpoints, tokens
from babelscope.models import names as names_of
from babelscope.report import data
from babelscope.tracking import summary

TINY = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
LLAMA_LIKE = {**TINY, "num_key_value_heads": 1, "intermediate_size": 24, "pad_token_id": 0, "bos_token_id": 1}
FAMILIES = {
    "llama": (transformers.LlamaConfig, LLAMA_LIKE),
    "qwen3": (transformers.Qwen3Config, {**LLAMA_LIKE, "head_dim": 8}),
    "gemma2": (transformers.Gemma2Config, {**LLAMA_LIKE, "head_dim": 8, "sliding_window": 3}),
    "gpt_neox": (transformers.GPTNeoXConfig, {**TINY, "intermediate_size": 24}),
    "bloom": (transformers.BloomConfig, {"vocab_size": 50, "hidden_size": 16, "n_layer": 4, "n_head": 2}),
    "falcon": (
        transformers.FalconConfig,
        {**TINY, "parallel_attn": True, "new_decoder_architecture": False, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "gpt2": (transformers.GPT2Config, {"vocab_size": 50, "n_embd": 16, "n_layer": 4, "n_head": 2}),
}


@pytest.fixture(params=FAMILIES)
def model(request):
    kind, options = FAMILIES[request.param]
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(kind(**options)).eval().requires_grad_(False)


def names(model):
    if model.config.model_type in ("gpt2", "bloom", "falcon"):
        return "h.1.mlp", "h.3"
    return "layers.1.mlp", "layers.3"


IDS = torch.tensor([[3, 4, 5, 6, 7], [8, 9, 10, 0, 0]])
MASK = (IDS > 0).long()


def test_read_gives_what_the_whole_pass_computes(model):
    wanted = names(model)
    seen = hookpoints.read(model, wanted, input_ids=IDS, attention_mask=MASK)
    assert set(seen) == set(wanted)
    whole = model(input_ids=IDS, attention_mask=MASK, output_hidden_states=True, use_cache=False)
    assert seen[wanted[0]].shape == (2, 5, 16)
    with hookpoints.block_inputs(model, [2]) as inputs:
        model(input_ids=IDS, attention_mask=MASK, use_cache=False)
    assert torch.equal(inputs[2], whole.hidden_states[2])


def test_an_edit_that_changes_nothing_changes_no_bit_and_one_that_does_is_undone(model):
    clean = model(input_ids=IDS, attention_mask=MASK, use_cache=False).logits
    with hookpoints.editing(model, {name: lambda x: x - torch.zeros_like(x) for name in names(model)}):
        same = model(input_ids=IDS, attention_mask=MASK, use_cache=False).logits
    assert torch.equal(clean, same)
    with hookpoints.editing(model, {names(model)[0]: lambda x: x + 1}):
        other = model(input_ids=IDS, attention_mask=MASK, use_cache=False).logits
    assert not torch.allclose(clean, other)
    assert torch.equal(clean, model(input_ids=IDS, attention_mask=MASK, use_cache=False).logits)


@pytest.mark.parametrize("layer", [0, 1, 3])
def test_starting_in_the_middle_gives_the_same_bits_as_the_whole_pass(model, layer):
    with hookpoints.block_inputs(model, [layer]) as inputs:
        clean = model(input_ids=IDS, attention_mask=MASK, use_cache=False).logits
    before = list(hookpoints.blocks(model))
    with hookpoints.starting_at(model, layer, inputs[layer]):
        resumed = model(input_ids=IDS, attention_mask=MASK, use_cache=False).logits
    assert torch.equal(clean, resumed)
    assert all(a is b for a, b in zip(before, hookpoints.blocks(model), strict=True))


def test_unknown_hookpoint_names_the_nearest():
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**LLAMA_LIKE))
    with pytest.raises(UserError, match=r"hookpoints: the model has no 'layers.9.mlp'; nearest: layers\.\d\.mlp"):
        hookpoints.resolve(model, ["layers.9.mlp"])


@pytest.mark.parametrize("name", ["embed_tokens", "norm"])
def test_a_hookpoint_outside_the_blocks_is_refused(name):
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**LLAMA_LIKE))
    with pytest.raises(UserError, match=f"'{name}' lies outside the model's blocks; nearest: layers"):
        hookpoints.resolve(model, [name])


def test_what_was_read_is_not_changed_by_what_the_block_does_next(model):
    name = names(model)[0]
    alone = hookpoints.read(model, [name], input_ids=IDS, attention_mask=MASK)[name]
    beside = hookpoints.read(model, names(model), input_ids=IDS, attention_mask=MASK)[name]
    assert torch.equal(alone, beside)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("layers.14.mlp", 14),
        ("layers.3", 3),
        ("h.0.attn", 0),
        ("layers.12.mlp.act_fn", 12),
        ("x", 0),
        ("h2o.layers.3", 3),
        ("h2o.layers.3.mlp", 3),
        ("layers.3.mlp.experts.5", 3),
    ],
)
def test_layer_of(name, layer):
    assert hookpoints.layer_of(name) == names_of.layer_of(name) == layer
    labels = data.layer_labels([name, "layers.77"])
    assert labels[name] == (str(layer) if name != "x" else "x")
    assert summary.layers([name])[name] == (layer, "")


def test_batches_hold_every_text_once_and_pad_little():
    texts = [tokens.TokenizedText(f"t{i:04d}", tuple(range(1, 3 + i * 7 % 61)), 1) for i in range(3000)]
    ordered = tokens.by_length(texts)
    cut = tokens.batches(ordered, 512)
    assert [t for batch in cut for t in batch] == ordered
    sizes = [len(b) * max(len(t.ids) for t in b) for b in cut]
    assert max(sizes) <= 512
    assert sum(sizes) < 1.05 * sum(len(t.ids) for t in texts)
    ids, mask = tokens.pad(cut[0], pad_id=9)
    assert ids.shape == mask.shape
    assert (ids[mask == 0] == 9).all() and mask.sum() == sum(len(t.ids) for t in cut[0])


def test_texts_are_cut_and_no_text_gives_no_tokens():
    words = Tokenizer(WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words)
    assert tokens.tokenize(tokenizer, ["t"], ["a b a"], 2) == [tokens.TokenizedText("t", (1, 2), 0)]
    assert tokens.tokenize(tokenizer, [], [], 2) == []
