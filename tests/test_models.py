"""Hookpoints on tiny randomly initialised models of several families."""

import copy

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE, Unigram, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, Metaspace, Whitespace
from tokenizers.processors import TemplateProcessing

from babelscope.core.errors import UserError
from babelscope.models import hookpoints, tokens
from babelscope.models import names as names_of
from babelscope.report.parts import layer_labels
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


def test_a_module_that_was_replaced_is_edited_in_its_new_place(model):
    """The search for modules is done once, but not if another module has taken the place."""
    name, before = names(model)[0], []
    with hookpoints.editing(model, {name: lambda x: before.append(x.clone()) or x}):
        model(input_ids=IDS, attention_mask=MASK, use_cache=False)
    block = hookpoints.blocks(model)[1]
    block.mlp = copy.deepcopy(block.mlp)
    seen = hookpoints.read(model, [name], input_ids=IDS, attention_mask=MASK)
    assert torch.equal(seen[name], before[0])
    with pytest.raises(UserError, match="the model has no"):
        hookpoints.read(model, [name, "layers.9.mlp"], input_ids=IDS, attention_mask=MASK)


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
    labels = layer_labels([name, "layers.77"])
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
    ids, mask = tokens.pad(cut[0])
    assert ids.shape == mask.shape
    assert (ids[mask == 0] == 0).all() and mask.sum() == sum(len(t.ids) for t in cut[0])


def test_texts_are_cut_and_no_text_gives_no_tokens():
    words = Tokenizer(WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words)
    assert tokens.tokenize(tokenizer, ["t"], ["a b a"], 2) == [tokens.TokenizedText("t", (1, 2), 0)]
    assert tokens.tokenize(tokenizer, [], [], 2) == []


def fast(tokenizer: Tokenizer, **more: str) -> transformers.PreTrainedTokenizerFast:
    """With `<s>` first and `</s>` last."""
    ends = [(name, tokenizer.token_to_id(name)) for name in ("<s>", "</s>")]
    tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"} | more
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def byte_level(**more: str) -> transformers.PreTrainedTokenizerFast:
    words = [*sorted(ByteLevel.alphabet()), "<pad>", "<s>", "</s>"]
    tokenizer = Tokenizer(BPE({word: number for number, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return fast(tokenizer, **more)


def unigram() -> transformers.PreTrainedTokenizerFast:
    """One that spells `<s>` with its special token even where it is told that special tokens are text."""
    names = [("<s>", 0.0), ("</s>", 0.0), ("<pad>", 0.0), ("<unk>", 0.0)]
    tokenizer = Tokenizer(Unigram(names + [(letter, -5.0) for letter in "\u2581abcdefghijklmnopqrstuvwxyz<>/"], 3))
    tokenizer.pre_tokenizer, tokenizer.decoder = Metaspace(), decoders.Metaspace()
    return fast(tokenizer, unk_token="<unk>")


TEXT = "strike <s>this</s> out <pad> now, \u00e9 \u6728"


def test_special_tokens_that_are_written_in_a_text_are_text():
    tokenizer = byte_level()
    [text, first] = tokens.tokenize(tokenizer, ["t", "f"], [TEXT, "</s>a"], 100)
    assert first == tokens.tokenize(tokenizer, ["f"], ["</s>a"], 100)[0] and first.special == 1
    assert text.ids[0] == tokenizer.bos_token_id and text.special == 1
    assert not set(text.ids[1:]) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(text.ids[1:]) == TEXT
    assert tokens.content_ids(tokenizer, [TEXT, ""]) == [list(text.ids[1:]), []]
    # and are special where the tokenizer itself is asked
    assert tokenizer.bos_token_id in tokenizer(TEXT, add_special_tokens=False)["input_ids"]


def test_special_tokens_are_left_out_where_nothing_else_spells_them_and_unknown_ones_stay():
    tokenizer = unigram()
    [ids] = tokens.content_ids(tokenizer, [TEXT])
    assert tokenizer.decode(ids) == "strike this out  now<unk> <unk> <unk>"
    [(shown, spans)] = tokens.spelled(tokenizer, [TEXT], 100)
    assert shown == TEXT and len(spans) == len(ids)
    read = "".join(shown[first:end] for first, end in dict.fromkeys(spans))
    assert read == TEXT.replace("<s>", "").replace("</s>", "").replace("<pad>", "")


def test_a_character_that_is_a_special_token_is_text():
    tokenizer = byte_level(pad_token="!")
    [ids] = tokens.content_ids(tokenizer, ["so!"])
    assert tokenizer.decode(ids) == "so!"


@pytest.mark.parametrize("unknown", [{}, {"unk_token": "<unk>"}])
def test_a_vocabulary_of_another_script_has_its_first_token_too(unknown):
    words = {name: number for number, name in enumerate(("<pad>", "<s>", "</s>", "<unk>", "\u043c\u0438\u0440"))}
    tokenizer = Tokenizer(WordLevel(words, **unknown))
    tokenizer.pre_tokenizer = Whitespace()
    empty, text = tokens.tokenize(fast(tokenizer, **unknown), ["e", "t"], ["", "\u043c\u0438\u0440"], 9)
    assert text == tokens.TokenizedText("t", (1, 4), 1)
    assert empty.content_tokens == 0


@pytest.mark.parametrize("name", ["byte level", "unigram", "ByT5", "Canine"])
@pytest.mark.parametrize("most", [3, 30, 100])
def test_every_token_has_its_place_in_the_text_with_a_fast_tokenizer_or_without(name, most):
    make = {
        "byte level": byte_level,
        "unigram": unigram,
        "ByT5": transformers.ByT5Tokenizer,
        "Canine": transformers.CanineTokenizer,
    }
    tokenizer, texts = make[name](), ["plain text, in words", "\u6728\u306e \u00e9\u00e8 \U0001f600!", TEXT, ""]
    for text, whole in zip(tokens.tokenize(tokenizer, texts, texts, most), texts, strict=True):
        [(shown, spans)] = tokens.spelled(tokenizer, [whole], most)
        assert len(spans) == text.content_tokens
        assert spans == sorted(spans) and all(0 <= first <= end <= len(shown) for first, end in spans)
        if name != "unigram":
            assert whole.startswith(shown) or shown == whole
            own = text.ids[text.special :]
            for place, (_, end) in enumerate(spans[:-1]):  # a token ends where the text decoded up to it does
                if spans[place + 1] != spans[place]:
                    assert tokenizer.decode(own[: place + 1]).rstrip("\ufffd") == shown[:end]


def test_a_text_must_fit_the_model():
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.LlamaConfig(**LLAMA_LIKE, max_position_embeddings=6)
    )
    tokens.check_fits(model, [tokens.TokenizedText("t", (1, 3, 4, 5, 6, 49), 1)])
    with pytest.raises(
        UserError, match=r"corpus.max_tokens: a text has 7 tokens, 1 special .* 6 positions .* at most 5"
    ):
        tokens.check_fits(model, [tokens.TokenizedText("t", (1, 3, 4, 5, 6, 7, 8), 1)])
    with pytest.raises(UserError, match=r"model.name: the tokenizer gives the token 50 \(text t\)"):
        tokens.check_fits(model, [tokens.TokenizedText("t", (1, 50), 1)])
