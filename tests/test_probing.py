"""What is measured on a model before it is relied on, on families that differ in it."""

import types
from typing import Any

import pytest
import torch
import transformers
from torch.nn import functional as F  # noqa: N812

from babelscope.ablation import ablate
from babelscope.ablation.interventions import FeatureAblation, NeuronAblation
from babelscope.core.errors import UserError
from babelscope.models import forward, hookpoints, logit_lens, partial, probing, tokens
from babelscope.quality.loss_recovered import loss_recovered
from babelscope.sae.autoencoder import SAE

D, WIDE, VOCABULARY, LAYERS = 16, 24, 60, 4
IDS = {"bos_token_id": 1, "eos_token_id": 2}
TINY = {**IDS, "vocab_size": VOCABULARY, "hidden_size": D, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
LLAMA = {**TINY, "num_key_value_heads": 1, "intermediate_size": WIDE, "pad_token_id": 0, "max_position_embeddings": 64}
HEADS = {**LLAMA, "head_dim": 8}
GEMMA_3N = {
    **HEADS, "intermediate_size": [WIDE] * LAYERS, "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0, "sliding_window": 4, "laurel_rank": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2, "activation_sparsity_pattern": [0.0] * LAYERS,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", LLAMA),
    "gemma2": ("Gemma2Config", {**HEADS, "sliding_window": 4}),
    "gemma3": ("Gemma3TextConfig", {**HEADS, "sliding_window": 4, "sliding_window_pattern": 2}),
    "gemma3n": ("Gemma3nTextConfig", GEMMA_3N),
    "olmo2": ("Olmo2Config", LLAMA),
    "olmo3": ("Olmo3Config", {**LLAMA, "sliding_window": 4}),
    "glm4": ("Glm4Config", HEADS),
    "exaone4": ("Exaone4Config", {**LLAMA, "sliding_window": 4, "sliding_window_pattern": 2}),
    "gpt_neox": ("GPTNeoXConfig", {**TINY, "intermediate_size": WIDE}),
    "falcon": ("FalconConfig", {**TINY, "parallel_attn": True, "new_decoder_architecture": False}),
    "falcon_h1": (
        "FalconH1Config",
        {**HEADS, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8,
         "mamba_chunk_size": 8},
    ),
    "mpt": ("MptConfig", {"vocab_size": VOCABULARY, "d_model": D, "n_layers": LAYERS, "n_heads": 2, "max_seq_len": 64}),
    "rwkv": (
        "RwkvConfig",
        {"vocab_size": VOCABULARY, "hidden_size": D, "num_hidden_layers": LAYERS, "context_length": 64},
    ),
    "bart": (
        "BartConfig",
        {**IDS, "vocab_size": VOCABULARY, "d_model": D, "decoder_layers": LAYERS, "encoder_layers": LAYERS,
         "decoder_attention_heads": 2, "decoder_ffn_dim": WIDE, "is_decoder": True, "is_encoder_decoder": False},
    ),
    "openai_gpt": ("OpenAIGPTConfig", {"vocab_size": VOCABULARY, "n_embd": D, "n_layer": LAYERS, "n_head": 2}),
    "modernbert": (
        "ModernBertDecoderConfig",
        {**TINY, "intermediate_size": WIDE, "local_attention": 8, "global_attn_every_n_layers": 2, "pad_token_id": 0},
    ),
    "minimax": ("MiniMaxConfig", {**HEADS, "num_local_experts": 2, "num_experts_per_tok": 1}),
}  # fmt: skip


def make(family: str, dtype: torch.dtype = torch.float32) -> Any:
    kind, options = FAMILIES[family]
    torch.manual_seed(1)
    config = getattr(transformers, kind)(**options)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():  # the usual initialisation is so small that a change would not be seen
        if parameter.dim() > 1:
            parameter.mul_(6)
    return model.to(dtype)


def texts() -> list[tokens.TokenizedText]:
    draw = torch.Generator().manual_seed(3)
    ids = [(1, *torch.randint(3, VOCABULARY, (2 + 3 * i % 8,), generator=draw).tolist()) for i in range(8)]
    return tokens.by_length([tokens.TokenizedText(f"t{i}", text, 1) for i, text in enumerate(ids)])


def random_sae() -> SAE:
    decoder = F.normalize(torch.randn(32, D, generator=torch.Generator().manual_seed(2)), dim=1)
    return SAE(decoder * 0.7, decoder, torch.zeros(32), torch.zeros(D), 4)


# --- hookpoints behind the attention


POST_NORMS = ["post_attention_layernorm", "post_feedforward_layernorm"]
BEHIND = {
    "llama": ["", "mlp", "mlp.act_fn", "mlp.down_proj", "self_attn", "self_attn.o_proj", "post_attention_layernorm"],
    **{family: ["", "mlp", *POST_NORMS] for family in ("gemma2", "gemma3", "olmo2", "olmo3", "exaone4")},
    "gemma3n": ["mlp", *POST_NORMS],  # its blocks hand on four residual streams
    "glm4": ["", "mlp", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"],
    "gpt_neox": ["", "mlp", "attention", "post_attention_layernorm"],
    "falcon": ["", "mlp", "self_attention"],
}
BEFORE = {
    **{family: ["input_layernorm", "self_attn.v_proj"] for family in ("llama", "gemma2", "gemma3", "gemma3n", "glm4")},
    **{family: ["self_attn.k_proj", "self_attn.v_proj"] for family in ("olmo2", "olmo3", "exaone4")},
    "gpt_neox": ["input_layernorm", "attention.query_key_value"],
    "falcon": ["input_layernorm"],  # which the MLP reads, too
}


@pytest.mark.parametrize("family", BEHIND)
def test_a_change_behind_the_attention_stays_in_its_token_until_the_next_block(family: str) -> None:
    model = make(family)
    stack = next(name for name, module in model.base_model.named_modules() if module is hookpoints.blocks(model))
    ids = torch.randint(3, VOCABULARY, (1, 9), generator=torch.Generator().manual_seed(0))
    for parts, stays in ((BEHIND[family], True), (BEFORE[family], False)):
        for part in parts:
            name = f"{stack}.2.{part}".removesuffix(".")
            assert probing.stays_in_place(model, name) == stays, name
            outputs: list[torch.Tensor] = []

            def note(_module: Any, _inputs: Any, output: Any, to: Any = outputs) -> None:
                to.append((output[0] if isinstance(output, tuple) else output).detach().clone())

            block = hookpoints.blocks(model)[2]
            handle = block.register_forward_hook(note, always_call=True)
            model(input_ids=ids, use_cache=False)

            def change(_module: Any, _inputs: Any, output: Any) -> Any:
                x = (output[0] if isinstance(output, tuple) else output).clone()
                x[:, 3] += torch.linspace(-1, 1, x.shape[-1])
                return (x, *output[1:]) if isinstance(output, tuple) else x

            # Of two hooks of a block the change is to come first.
            other = model.base_model.get_submodule(name).register_forward_hook(change, prepend=True)
            model(input_ids=ids, use_cache=False)
            handle.remove()
            other.remove()
            moved = (outputs[1] - outputs[0]).abs().flatten(0, -3).amax((0, -1))
            assert moved[3] > 1e-3 and (moved[4:].max() < 1e-6) == stays, name


def test_what_is_not_a_vector_per_token_is_not_in_place() -> None:
    assert not probing.stays_in_place(make("gemma3n"), "layers.1")
    assert not probing.stays_in_place(make("minimax"), "layers.1.mlp.experts.act_fn")
    assert not probing.stays_in_place(make("llama"), "layers.9.mlp")


# --- restarting


def nll_by_hook(model: Any, text: tokens.TokenizedText, name: str, change: Any) -> float:
    ids = torch.tensor([text.ids])

    def hook(_module: Any, _inputs: Any, output: Any) -> Any:
        x = (output[0] if isinstance(output, tuple | list) else output).clone()
        x[:, text.special :] = change(x[:, text.special :])
        if isinstance(output, list):
            return [x, *output[1:]]
        return (x, *output[1:]) if isinstance(output, tuple) else x

    handle = model.base_model.get_submodule(name).register_forward_hook(hook)
    logits = model(input_ids=ids, use_cache=False).logits[0].detach()
    handle.remove()
    return float(F.cross_entropy(logits[:-1], ids[0, 1:], reduction="sum"))


class Remembering:
    """A second block that adds what the first one gave in the last pass: upper blocks need what lower ones computed."""

    def __init__(self, model: Any) -> None:
        first, last = model.model.layers[0].mlp, model.model.layers[3].mlp
        first.register_forward_hook(lambda _m, _i, out: setattr(self, "value", out))
        last.register_forward_hook(lambda _m, _i, out: out + self.value)


@pytest.mark.parametrize(
    ("family", "name"),
    [("mpt", "blocks.1.ffn"), ("mpt", "blocks.1"), ("gemma3n", "layers.1.mlp"), ("gemma3n", "layers.2.self_attn"),
     ("falcon", "h.1.mlp"), ("openai_gpt", "h.1"), ("openai_gpt", "h.2.mlp"), ("remembering", "layers.2.mlp")],
)  # fmt: skip
def test_ablation_and_quality_are_those_of_ordinary_hooks_wherever_a_pass_can_start(family: str, name: str) -> None:
    model = make("llama" if family == "remembering" else family)
    if family == "remembering":
        Remembering(model)
    layer = hookpoints.layer_of(name)
    assert probing.can_restart(model, [layer]) == (family not in ("gemma3n", "remembering"))
    sae, units = random_sae(), list(range(0, 32, 2))

    def without(x: torch.Tensor) -> torch.Tensor:
        values, indices = sae.encode(x.reshape(-1, D))
        dense = torch.zeros(len(values), 32).scatter_add(1, indices, values)
        return x - (dense[:, units] @ sae.W_dec[units]).view_as(x)

    found = ablate.ablate(model, {name: FeatureAblation(sae, [units])}, texts(), 40)
    wanted = torch.tensor([nll_by_hook(model, text, name, without) for text in texts()]).double()
    clean = torch.tensor([nll_by_hook(model, text, name, lambda x: x) for text in texts()]).double()
    torch.testing.assert_close(found.clean, clean, rtol=1e-4, atol=2e-4)
    torch.testing.assert_close(found.ablated[0], wanted, rtol=1e-4, atol=2e-4)
    assert (wanted - clean).abs().max() > 1e-3

    def rebuilt(x: torch.Tensor) -> torch.Tensor:
        return sae(x.reshape(-1, D)).view_as(x)

    quality = loss_recovered(model, {name: sae}, texts(), ["en"] * 8, ["en"], 40).row(0, named=True)
    for key, change in (("nll_sae", rebuilt), ("nll_zero", torch.zeros_like), ("nll_clean", lambda x: x)):
        whole = sum(nll_by_hook(model, text, name, change) for text in texts())
        assert quality[key] == pytest.approx(whole / quality["tokens"], abs=1e-4), key


# --- partial passes


def leaking(model: Any, share: float) -> Any:
    """Every attention also adds a little of the mean over all tokens, those that come later among them."""
    for block in model.model.layers:
        block.self_attn.register_forward_hook(
            lambda _m, _i, out: (out[0] + share * out[0].mean(1, keepdim=True), *out[1:])
        )
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_attention_that_leaks_is_found_in_every_precision(dtype: torch.dtype) -> None:
    model = make("llama", dtype)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    assert partial.suits(model, 24)
    for share in (1.0, 0.1, 0.02):
        assert not partial.suits(leaking(make("llama", dtype), share), 24), share
    assert all(weight.dtype == before[n].dtype and weight.equal(before[n]) for n, weight in model.state_dict().items())


def test_a_model_that_raises_in_the_probe_is_served_by_whole_passes() -> None:
    model = make("mpt")  # asks for a mask that an attention of ours does not make
    assert not partial.suits(model, 9)
    model = make("llama", torch.bfloat16)
    model.model.layers[2].mlp.forward = types.MethodType(lambda *_: 1 / 0, model.model.layers[2].mlp)
    assert not partial.suits(model, 9)
    assert all(weight.dtype == torch.bfloat16 for weight in model.parameters())


# --- the order of rows


def test_rows_in_the_order_of_experts_are_refused() -> None:
    model = make("minimax")
    assert forward.widths(model, ["layers.1.mlp", "layers.1"]) == {"layers.1.mlp": D, "layers.1": D}
    with pytest.raises(UserError, match=r"params\.yaml: neurons\.hookpoints: 'layers\.1\.mlp\.experts\.act_fn' does"):
        forward.widths(model, ["layers.1.mlp.experts.act_fn"], "neurons.hookpoints")


class Sorted(torch.nn.Module):
    """One vector per token, in an order of its own: as top-1 experts give them."""

    def __init__(self, is_sorted: bool) -> None:
        super().__init__()
        self.linear, self.inner, self.is_sorted = torch.nn.Linear(D, D), torch.nn.Identity(), is_sorted

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = self.linear(x.flatten(0, 1))
        order = rows[:, 0].sign().argsort(stable=True) if self.is_sorted else torch.arange(len(rows))
        rows = self.inner(rows[order])[order.argsort()]
        return rows.view_as(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_order_is_measured_not_known_by_name(dtype: torch.dtype) -> None:
    for is_sorted in (False, True):
        model = make("llama")
        model.model.layers[1].mlp = Sorted(is_sorted)
        model.to(dtype)
        if not is_sorted:
            assert forward.widths(model, ["layers.1.mlp.inner"]) == {"layers.1.mlp.inner": D}
            continue
        with pytest.raises(UserError, match="does not give its vectors in the order of the tokens; allowed"):
            forward.widths(model, ["layers.1.mlp.inner"])


def test_a_module_that_runs_several_times_in_a_pass_is_refused() -> None:
    model = make("llama")
    model.model.layers[3].mlp = model.model.layers[1].mlp
    with pytest.raises(UserError, match=r"'layers\.1\.mlp' .*a forward pass runs its module 2 times"):
        forward.widths(model, ["layers.1.mlp"])


def test_a_name_whose_number_is_not_that_of_the_block_is_refused() -> None:
    model = make("llama")
    layers = model.model.layers
    del model.model.layers
    model.model.stage = torch.nn.ModuleDict({"0": torch.nn.Module()})
    model.model.stage["0"].layers = layers
    hookpoints.resolve(model, ["stage.0.layers.0.mlp"])
    with pytest.raises(UserError, match=r"'stage\.0\.layers\.2\.mlp' lies in block 2 of the model, but the first num"):
        hookpoints.resolve(model, ["stage.0.layers.2.mlp"])


def test_neurons_of_experts_that_all_tokens_pass_are_ablated_as_any_others() -> None:
    model = make("minimax")
    found = ablate.ablate(model, {"layers.1.mlp": NeuronAblation(D, [[0, 3]])}, texts(), 40)

    def zero(x: torch.Tensor) -> torch.Tensor:
        x[..., [0, 3]] = 0
        return x

    wanted = torch.tensor([nll_by_hook(model, text, "layers.1.mlp", zero) for text in texts()]).double()
    torch.testing.assert_close(found.ablated[0], wanted, rtol=1e-4, atol=2e-4)


# --- the logit lens


@pytest.mark.parametrize(
    "family", ["falcon", "falcon_h1", "mpt", "rwkv", "bart", "openai_gpt", "gemma2", "gemma3", "olmo3"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_lens_of_a_model_that_has_not_run_yet_is_the_change_of_its_logits(family: str, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(5)
    stream, v = torch.randn(1, D, generator=draw), torch.randn(1, D, generator=draw)
    model = make(family, dtype)
    if family == "gemma2":
        model.config.final_logit_softcapping = None
    [lens] = logit_lens.direct_logits(model, v)
    # Of mean 0 and orthogonal to v: either sign of v gives the norm the same size.
    stream, flat = stream - stream.mean(), v - v.mean()
    stream = stream - (stream * flat).sum() / flat.square().sum() * flat
    up, down = (hookpoints.logits_of(model, (stream + sign * v).to(dtype)).float() for sign in (1, -1))
    assert F.cosine_similarity(up - down, lens) > (0.999 if dtype == torch.float32 else 0.99)


@pytest.mark.parametrize("family", ["gemma3n", "modernbert"])
def test_a_model_with_more_than_a_norm_before_its_logits_has_no_lens(family: str) -> None:
    with pytest.raises(UserError, match="has no logit lens: more than a norm and the unembedding lies"):
        list(logit_lens.direct_logits(make(family), torch.ones(1, D)))
