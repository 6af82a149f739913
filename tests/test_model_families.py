"""Every family that docs/models.md names, on a tiny model of its class: names, reading, changing, restarting."""

import re
from types import SimpleNamespace

import pytest
import torch
import transformers
from closure import ROOT
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch.nn import functional as F  # noqa: N812

from babelscope.ablation import ablate
from babelscope.ablation.interventions import FeatureAblation, NeuronAblation
from babelscope.baselines import dictionaries
from babelscope.core.errors import UserError
from babelscope.models import forward, hookpoints, loading, logit_lens, partial, tokens
from babelscope.sae.autoencoder import SAE

D, WIDE, VOCABULARY, LAYERS, LATENTS = 16, 24, 60, 4, 48
TINY = {"vocab_size": VOCABULARY, "hidden_size": D, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
LLAMA = {
    **TINY,
    "num_key_value_heads": 1,
    "intermediate_size": WIDE,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
IDS = {"bos_token_id": 1, "eos_token_id": 2}
# Configuration, its settings (windows are shorter than the texts), and what docs/models.md calls the family.
FAMILIES = {
    "llama": ("LlamaConfig", LLAMA, "Llama"),
    "mistral": ("MistralConfig", {**LLAMA, "sliding_window": 5}, "Mistral"),
    "qwen2": (
        "Qwen2Config",
        {**LLAMA, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
        "Qwen2",
    ),
    "qwen3": ("Qwen3Config", {**LLAMA, "head_dim": 8}, "Qwen3"),
    "gemma2": ("Gemma2Config", {**LLAMA, "head_dim": 8, "sliding_window": 4}, "Gemma 2"),
    "gemma3": (
        "Gemma3TextConfig",
        {**LLAMA, "head_dim": 8, "sliding_window": 4, "sliding_window_pattern": 2},
        "Gemma 3",
    ),
    "gpt_neox": ("GPTNeoXConfig", {**TINY, **IDS, "intermediate_size": WIDE}, "GPT-NeoX, Pythia"),
    "gpt2": ("GPT2Config", {**IDS, "vocab_size": VOCABULARY, "n_embd": D, "n_layer": LAYERS, "n_head": 2}, "GPT-2"),
    "opt": ("OPTConfig", {**TINY, **IDS, "ffn_dim": WIDE, "word_embed_proj_dim": D, "pad_token_id": 0}, "OPT"),
    "bloom": (
        "BloomConfig",
        {**IDS, "vocab_size": VOCABULARY, "hidden_size": D, "n_layer": LAYERS, "n_head": 2},
        "BLOOM",
    ),
    "phi": ("PhiConfig", {**TINY, **IDS, "intermediate_size": WIDE}, "Phi"),
    "phi3": ("Phi3Config", LLAMA, "Phi-3"),
    "olmo": ("OlmoConfig", LLAMA, "OLMo"),
    "olmo2": ("Olmo2Config", LLAMA, "OLMo 2"),
}
KINDS = ("MLP output", "residual stream", "attention output", "neurons")


def documented() -> dict[str, dict[str, str]]:
    """The table of docs/models.md: family, kind of hookpoint, its name with N for the layer."""
    rows = [
        [cell.strip().strip("`") for cell in line.strip("|").split("|")]
        for line in (ROOT / "docs/models.md").read_text().splitlines()
        if line.startswith("|") and "N" in line and "`" in line
    ]
    return {row[0]: dict(zip(KINDS, row[1:], strict=True)) for row in rows}


NAMES = documented()


def make(family: str) -> transformers.PreTrainedModel:
    kind, options, _ = FAMILIES[family]
    torch.manual_seed(1)
    config = getattr(transformers, kind)(**options)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():  # the usual initialisation is so small that a change would not be seen
        if parameter.dim() > 1:
            parameter.mul_(6)
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest) -> SimpleNamespace:
    names = NAMES[FAMILIES[request.param][2]]
    at = {kind: re.sub(r"\bN\b", "1", name) for kind, name in names.items()}
    return SimpleNamespace(family=request.param, model=make(request.param), at=at)


def batch(side: str = "right") -> tuple[torch.Tensor, torch.Tensor]:
    rows = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(rows)
    hidden = slice(5, None) if side == "right" else slice(0, 4)
    rows[1, hidden], mask[1, hidden] = 0, 0
    return rows, mask


def test_the_documented_families_are_those_tested() -> None:
    assert set(NAMES) == {name for _, _, name in FAMILIES.values()}


def test_what_is_read_is_what_the_module_gives(case: SimpleNamespace) -> None:
    ids, mask = batch()
    whole: dict[str, torch.Tensor] = {}
    handles = [
        case.model.base_model.get_submodule(name).register_forward_hook(
            lambda _m, _i, out, name=name: whole.__setitem__(name, (out[0] if isinstance(out, tuple) else out).clone())
        )
        for name in case.at.values()
    ]
    case.model(input_ids=ids, attention_mask=mask, use_cache=False)
    for handle in handles:
        handle.remove()
    own = mask.bool()
    seen = forward.content_activations(case.model, list(case.at.values()), (ids, mask, own), torch.float32)
    wide = {"neurons": {"gpt2": 4 * D, "bloom": 4 * D}.get(case.family, WIDE)}
    for kind, name in case.at.items():
        assert seen[name].shape == (int(own.sum()), wide.get(kind, D)), kind
        assert torch.equal(seen[name], whole[name].reshape(*ids.shape, -1)[own]), kind
    # What the block writes is its residual stream less what came in: the parts' outputs are those that are added.
    assert hookpoints.width(case.model, case.at["residual stream"]) == D


def test_padding_on_either_side_changes_nothing(case: SimpleNamespace) -> None:
    """Texts are padded on the right whatever the tokenizer does; alone, a text gives the same."""
    ids, mask = batch()
    names = list(case.at.values())
    together = forward.content_activations(case.model, names, (ids, mask, mask.bool()), torch.float32)
    alone = ids[1:, :5]
    by_itself = forward.content_activations(
        case.model, names, (alone, torch.ones_like(alone), torch.ones_like(alone).bool()), torch.float32
    )
    for name in names:
        torch.testing.assert_close(together[name][-5:], by_itself[name], rtol=0, atol=1e-4)


@pytest.mark.parametrize("layer", [0, 2, 3])
def test_a_pass_can_start_in_the_middle(case: SimpleNamespace, layer: int) -> None:
    ids, mask = batch()
    with hookpoints.block_inputs(case.model, [layer]) as inputs:
        clean = case.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    with hookpoints.starting_at(case.model, layer, inputs[layer]):
        resumed = case.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    assert torch.equal(clean, resumed)


def texts() -> list[tokens.TokenizedText]:
    draw = torch.Generator().manual_seed(3)
    ids = [(1, *torch.randint(3, VOCABULARY, (2 + 3 * i % 8,), generator=draw).tolist()) for i in range(8)]
    return tokens.by_length([tokens.TokenizedText(f"t{i}", text, 1) for i, text in enumerate(ids)])


def loop(model: transformers.PreTrainedModel, text: tokens.TokenizedText, name: str, change: object) -> float:
    """NLL of one text in one whole pass with an ordinary hook."""
    ids = torch.tensor([text.ids])

    def hook(_module: object, _inputs: object, output: object) -> object:
        x = (output[0] if isinstance(output, tuple) else output).clone()
        flat = x.reshape(-1, x.shape[-1])
        flat[text.special :] = change(flat[text.special :])
        x = flat.view(x.shape)
        return (x, *output[1:]) if isinstance(output, tuple) else x

    handle = model.base_model.get_submodule(name).register_forward_hook(hook)
    logits = model(input_ids=ids, use_cache=False).logits[0]
    handle.remove()
    return float(F.cross_entropy(logits.detach()[:-1], ids[0, 1:], reduction="none")[max(text.special - 1, 0) :].sum())


@pytest.mark.parametrize("kind", KINDS)
def test_an_ablation_is_that_of_an_ordinary_hook(case: SimpleNamespace, kind: str) -> None:
    name = case.at[kind]
    units = list(range(0, LATENTS if kind != "neurons" else WIDE, 2))
    if kind == "neurons":
        done = NeuronAblation(hookpoints.width(case.model, name), [units])

        def change(x: torch.Tensor) -> torch.Tensor:
            x[:, units] = 0
            return x

    else:
        draw = torch.Generator().manual_seed(2)
        decoder = F.normalize(torch.randn(LATENTS, D, generator=draw), dim=1)
        sae = SAE(decoder * 0.7, decoder, torch.zeros(LATENTS), torch.zeros(D), 4)
        done = FeatureAblation(sae, [units])

        def change(x: torch.Tensor) -> torch.Tensor:
            values, indices = sae.encode(x)
            dense = torch.zeros(len(x), LATENTS).scatter_add(1, indices, values)
            return x - dense[:, units] @ sae.W_dec[units]

    found = ablate.ablate(case.model, {name: done}, texts(), 40)
    wanted = torch.tensor([loop(case.model, text, name, change) for text in texts()])
    clean = torch.tensor([loop(case.model, text, name, lambda x: x) for text in texts()])
    torch.testing.assert_close(found.clean, clean.double(), rtol=1e-4, atol=2e-4)
    torch.testing.assert_close(found.ablated[0], wanted.double(), rtol=1e-4, atol=2e-4)
    assert (wanted - clean).abs().max() > 1e-3


def test_which_families_are_restarted_token_by_token(case: SimpleNamespace) -> None:
    """The others are ablated by passes over whole texts, which takes longer."""
    whole = {"mistral", "qwen2", "gemma2", "gemma3", "bloom"}
    assert partial.suits(case.model, 9) == (case.family not in whole)


def test_the_lens_is_the_change_of_the_logits(case: SimpleNamespace) -> None:
    """Written into the last residual stream in a small dose, a direction moves the logits along its lens."""
    draw = torch.Generator().manual_seed(5)
    stream, v = torch.randn(1, D, generator=draw), torch.randn(1, D, generator=draw)
    [lens] = logit_lens.direct_logits(case.model, v)
    gain, centred = logit_lens.final_norm(case.model)
    assert gain.shape == (D,) and lens.shape == (1, VOCABULARY)
    if case.family in ("gemma2",):  # its logits are capped after that
        return
    # Against a stream that v does not lengthen: of mean 0 and orthogonal to v, where the norm's own change vanishes.
    stream = stream - stream.mean()
    flat = v - v.mean() if centred else v
    stream = stream - (stream * flat).sum() / (flat * flat).sum() * flat
    epsilon, size = 1e-2, (stream - stream.mean() if centred else stream).square().mean().sqrt()
    moved = hookpoints.logits_of(case.model, stream + epsilon * v) - hookpoints.logits_of(
        case.model, stream - epsilon * v
    )
    direct = moved * size / (2 * epsilon)
    torch.testing.assert_close(direct, lens, rtol=0, atol=2e-2 * float(lens.abs().max()))


def test_generation_with_the_cache_under_a_change_is_that_of_whole_passes(case: SimpleNamespace) -> None:
    name, ids = (
        case.at["residual stream"],
        torch.randint(3, VOCABULARY, (1, 4), generator=torch.Generator().manual_seed(8)),
    )
    push = {name: lambda x: x + 0.5}
    with hookpoints.editing(case.model, push):
        cached = case.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=5,
            min_new_tokens=5,
            use_cache=True,
        )
        grown = ids
        for _ in range(5):
            logits = case.model(input_ids=grown, use_cache=False).logits[:, -1]
            logits[:, case.model.generation_config.eos_token_id or 2] = -torch.inf
            grown = torch.cat([grown, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(cached, grown)


def test_a_wrong_name_is_answered_with_the_nearest(case: SimpleNamespace) -> None:
    right = case.at["attention output"]
    with pytest.raises(UserError, match=f"the model has no '{right}x'; nearest: .*{re.escape(right)}"):
        hookpoints.resolve(case.model, [f"{right}x"])


def test_the_neurons_of_a_block_are_found(case: SimpleNamespace) -> None:
    assert dictionaries.neurons_of(case.model, 1) == case.at["neurons"]


def test_blocks_without_neurons_or_with_those_of_experts_are_refused() -> None:
    model = make("llama")
    model.model.layers[1].mlp.expert = torch.nn.Module()
    model.model.layers[1].mlp.expert.act_fn = torch.nn.SiLU()
    with pytest.raises(UserError, match=r"baselines\.dictionaries: .* several .*\(layers\.1\.mlp\.act_fn, layers"):
        dictionaries.neurons_of(model, 1)
    model.model.layers[1].mlp = torch.nn.Linear(D, D)
    with pytest.raises(UserError, match="block 1 of LlamaForCausalLM has no module for it"):
        dictionaries.neurons_of(model, 1)


def test_a_family_that_is_not_listed_works_by_its_modules_paths() -> None:
    torch.manual_seed(0)
    config = transformers.StableLmConfig(**LLAMA)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    ids, mask = batch()
    seen = hookpoints.read(model, ["layers.1.mlp.down_proj", "layers.3"], input_ids=ids, attention_mask=mask)
    assert seen["layers.1.mlp.down_proj"].shape == (2, 9, D)


@pytest.mark.parametrize(("template", "special"), [("[BOS] $A", 1), ("$A", 0), ("$A [EOS]", 0), ("[BOS] $A [EOS]", 1)])
@pytest.mark.parametrize("side", ["left", "right"])
def test_leading_special_tokens_are_kept_apart_and_closing_ones_dropped(template: str, special: int, side: str) -> None:
    words = Tokenizer(WordLevel({"[UNK]": 0, "[BOS]": 1, "[EOS]": 2, "a": 3, "b": 4}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing(single=template, special_tokens=[("[BOS]", 1), ("[EOS]", 2)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="[BOS]", eos_token="[EOS]", padding_side=side
    )
    [short, long] = tokens.tokenize(tokenizer, ["s", "l"], ["a b", "a b a b"], 3)
    assert (short.ids, short.special) == ((1,) * special + (3, 4), special)
    assert long.ids == (1,) * special + (3, 4, 3)
    ids, mask, own = forward.collate([short, long])
    assert ids.shape == (2, 3 + special) and mask[0, -1] == 0 and int(own.sum()) == 5


def test_quantised_loading_is_asked_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def from_pretrained(place: str, **options: object) -> tuple[transformers.PreTrainedModel, dict[str, list[str]]]:
        asked.update(options)
        return make("llama"), {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda place, **options: SimpleNamespace())
    section = SimpleNamespace(
        source="huggingface", name="owner/name", gguf_file=None, sha256=None, revision=None, trust_remote_code=False,
        quantization="4bit",
    )  # fmt: skip
    monkeypatch.setattr(loading, "_has_bitsandbytes", lambda: True)
    loading.load_model(section, "bfloat16")
    assert asked["quantization_config"].load_in_4bit
    assert asked["quantization_config"].bnb_4bit_compute_dtype == torch.bfloat16
    monkeypatch.setattr(loading, "_has_bitsandbytes", lambda: False)
    with pytest.raises(UserError, match=r"model\.quantization: '4bit' needs the package bitsandbytes"):
        loading.load_model(section, "bfloat16")
