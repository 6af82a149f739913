"""Weights come from the file, all of them; a GGUF file is unpacked once, into what transformers reads from it."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from babelscope.config import schema
from babelscope.core.errors import UserError
from babelscope.models import loading, probing

Weights = dict[str, torch.Tensor]
TINY = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 48}
MODELS = {
    "llama": transformers.LlamaConfig(**TINY),
    "tied": transformers.LlamaConfig(**TINY, tie_word_embeddings=True),
    "gpt2": transformers.GPT2Config(vocab_size=60, n_embd=32, n_layer=4, n_head=2),
    "mixtral": transformers.MixtralConfig(**TINY, num_local_experts=4, num_key_value_heads=1),
    "deepseek_v3": transformers.DeepseekV3Config(
        **TINY, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, moe_intermediate_size=16,
        first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16,
    ),
}  # fmt: skip
BERT_LIKE = {
    name: getattr(transformers, name)(**TINY)
    for name in ("BertConfig", "RobertaConfig", "XLMRobertaConfig", "ElectraConfig", "CamembertConfig")
} | {
    "XLNetConfig": transformers.XLNetConfig(vocab_size=60, d_model=32, n_layer=2, n_head=2, d_inner=48),
    "Gemma3TextConfig": transformers.Gemma3TextConfig(
        **TINY, head_dim=16, num_key_value_heads=1, use_bidirectional_attention=True
    ),
}
WORDS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "c", "Ġ", "ab", "Ġc"]


def model_at(folder: Path, gguf_file: str | None = None) -> schema.Model:
    known = {"source": "huggingface", "name": str(folder), "gguf_file": gguf_file, "sha256": None, "revision": None}
    return schema.Model(**known, quantization=None, trust_remote_code=False)


def written(
    config: transformers.PretrainedConfig, folder: Path, change: Callable[[Weights], Weights]
) -> transformers.PreTrainedModel:
    """A model whose weights are in `folder`, changed."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    weights = change(load_file(folder / "model.safetensors"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return model


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("extra", [{}, {"mtp.head.weight": torch.ones(3), "vision.0.bias": torch.ones(2)}])
def test_whole_weights_are_read_and_further_tensors_named(
    tmp_path: Path, name: str, extra: Weights, caplog: pytest.LogCaptureFixture
) -> None:
    def change(weights: Weights) -> Weights:  # a buffer may be absent: it is 0 by the model's code
        return {key: value for key, value in weights.items() if "e_score" not in key} | extra

    weights = written(MODELS[name], tmp_path, change).state_dict()
    with caplog.at_level("WARNING"):
        read = loading.load_model(model_at(tmp_path), "float32").state_dict()
    assert read.keys() == weights.keys() and all(torch.equal(read[key], weights[key]) for key in read)
    warnings = [record.getMessage() for record in caplog.records if record.name == loading.__name__]
    assert [text.partition(": ")[2] for text in warnings] == (
        [f"2 tensors of the file are not part of {MODELS[name].architectures[0]}: mtp.head.weight, vision.0.bias"]
        if extra else []
    )  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("fault", ["_orig_mod.", "module.", "half of the blocks", "one weight", "narrower"])
def test_weights_that_a_file_lacks_are_named(tmp_path: Path, name: str, fault: str) -> None:
    def change(weights: Weights) -> Weights:
        if fault.endswith("."):
            return {fault + key: value for key, value in weights.items()}
        if fault == "half of the blocks":
            return {key: value for key, value in weights.items() if not any(f".{n}." in key for n in (2, 3))}
        last = max(key for key in weights if key.endswith("norm.weight") or "ln_1.weight" in key)
        if fault == "one weight":
            return {key: value for key, value in weights.items() if key != last}
        return weights | {last: weights[last][:-1].clone()}

    written(MODELS[name], tmp_path, change)
    lacking = r"has in another shape 1 of the \d+ .*norm\.weight \[31\] \(the model's: \[32\]\)"
    if fault != "narrower":
        lacking = r"lacks \d+ of the \d+ weights of \w+, which would stay random: \S+\.\S+"
    if fault.endswith("."):
        lacking += rf".*it holds tensors that the model does not have: {fault}"
    with pytest.raises(
        UserError, match=f"^params.yaml: model.name: .*the file {lacking.replace('norm', '(norm|ln_1)')}"
    ):
        loading.load_model(model_at(tmp_path), "float32")


def test_tied_weights_are_not_drawn_first(tmp_path: Path) -> None:
    model, state = written(MODELS["tied"], tmp_path, lambda weights: weights), torch.get_rng_state()
    found = loading.load_model(model_at(tmp_path), "float32")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(found.lm_head.weight, model.lm_head.weight)
    assert found.lm_head.weight is found.model.embed_tokens.weight


def test_a_head_that_is_not_tied_must_be_in_the_file(tmp_path: Path) -> None:
    written(MODELS["llama"], tmp_path, lambda weights: {k: v for k, v in weights.items() if k != "lm_head.weight"})
    with pytest.raises(UserError, match=r"lacks 1 of the 39 weights of LlamaForCausalLM.*: lm_head\.weight; allowed"):
        loading.load_model(model_at(tmp_path), "float32")


@pytest.mark.parametrize(
    ("name", "dtype"),
    # transformers 5.24 runs XLNet in float32 only
    [
        (name, kind)
        for name in BERT_LIKE
        for kind in ("float32", "bfloat16", "float16")
        if name != "XLNetConfig" or kind == "float32"
    ],
)
def test_a_model_that_reads_ahead_is_refused(tmp_path: Path, name: str, dtype: str) -> None:
    written(BERT_LIKE[name], tmp_path, lambda weights: weights)
    with pytest.raises(UserError, match=r"model\.name: .* is no causal language model"):
        loading.load_model(model_at(tmp_path), dtype)


@pytest.mark.parametrize("name", [*MODELS, "bert as a decoder"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_causal_model_is_none_that_reads_ahead(name: str, dtype: torch.dtype) -> None:
    config = MODELS[name] if name in MODELS else transformers.BertConfig(**TINY, is_decoder=True)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval().requires_grad_(False)
    assert not probing.reads_ahead(model)
    assert not any(module._forward_hooks for module in model.modules())


def test_an_encoder_decoder_model_is_refused(tmp_path: Path) -> None:
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = transformers.BartConfig(vocab_size=60, d_model=32, encoder_ffn_dim=32, decoder_ffn_dim=32, **sizes)
    transformers.AutoModelForSeq2SeqLM.from_config(config).save_pretrained(tmp_path)
    for load in (loading.load_skeleton, lambda section: loading.load_model(section, "float32")):
        with pytest.raises(UserError, match=r"is an encoder-decoder model \(bart\)"):
            load(model_at(tmp_path))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"

    def place(*names: str) -> Path:
        (folder.joinpath(*names)).mkdir(parents=True, exist_ok=True)
        return folder.joinpath(*names)

    monkeypatch.setattr(huggingface_hub, "cached_assets_path", place)
    return folder


@pytest.fixture
def section(tmp_path: Path) -> schema.Model:
    """A Llama of one block with packed weights (Q8_0) and a byte-level tokenizer, in one GGUF file."""
    write_gguf(tmp_path / "tiny.gguf")
    return model_at(tmp_path, "tiny.gguf")


def write_gguf(path: Path, lacking: str = "") -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_types([3, 3, 3, 1, 1, 1, 1, 1, 1])
    writer.add_token_merges(["a b", "Ġ c"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    shapes = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32),
              "ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64)}  # fmt: skip
    tensors = {f"blk.0.{name}.weight": shape for name, shape in shapes.items() if name != lacking}
    rng = np.random.default_rng(0)
    for name, shape in {"token_embd.weight": (len(WORDS), 32), **tensors}.items():
        packed = gguf.quants.quantize(rng.normal(size=shape).astype(np.float32), gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    for name in ("blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "output_norm.weight"):
        writer.add_tensor(name, rng.normal(1, 0.1, 32).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_kept_is_what_transformers_reads(section: schema.Model, cache: Path, dtype: str) -> None:
    kept = loading.load_model(section, dtype)
    read = transformers.AutoModelForCausalLM.from_pretrained(
        section.name, gguf_file=section.gguf_file, dtype=loading.DTYPES[dtype]
    )
    weights, others = kept.state_dict(), read.state_dict()
    assert weights.keys() == others.keys()
    assert all(torch.equal(weight, others[name]) for name, weight in weights.items())
    ids = torch.tensor([[1, 3, 4, 5, 7, 8]])
    assert torch.equal(kept(input_ids=ids).logits, read(input_ids=ids).logits)
    mine, theirs = kept.config.to_dict(), read.config.to_dict()
    assert {key for key in mine | theirs if mine.get(key) != theirs.get(key)} <= {
        "_name_or_path", "quantization_config",
    }  # fmt: skip
    tokenizer = loading.load_tokenizer(section)
    as_read = transformers.AutoTokenizer.from_pretrained(section.name, gguf_file=section.gguf_file)
    assert tokenizer.backend_tokenizer.to_str() == as_read.backend_tokenizer.to_str()
    assert tokenizer("ab c")["input_ids"] == as_read("ab c")["input_ids"]
    assert tokenizer.special_tokens_map == as_read.special_tokens_map


def test_it_is_read_once_and_anew_where_the_file_has_changed(
    section: schema.Model, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unpack, calls = loading._unpack, []
    monkeypatch.setattr(loading, "_unpack", lambda *given: (calls.append(given), unpack(*given)))
    first = loading.load_model(section, "float32").state_dict()
    loading.load_tokenizer(section), loading.load_model(section, "float32")
    assert len(calls) == 1
    file = Path(section.name) / "tiny.gguf"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1  # within the weights of the last norm
    file.write_bytes(content)
    other = loading.load_model(section, "float32").state_dict()
    assert len(calls) == 2
    assert [name for name in first if not torch.equal(first[name], other[name])] == ["model.norm.weight"]


def test_a_damaged_file_is_refused_and_leaves_nothing_behind(section: schema.Model, cache: Path) -> None:
    (Path(section.name) / "tiny.gguf").write_bytes(b"GGUF but no more")
    with pytest.raises(UserError, match="model.name: cannot load the weights of"):
        loading.load_model(section, "float32")
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_a_cache_that_cannot_be_written_and_a_large_file_are_read_the_slow_way(
    section: schema.Model, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = loading.load_model(section, "float32").state_dict()

    def check() -> None:
        slow = loading.load_model(section, "float32").state_dict()
        assert all(torch.equal(kept[name], weight) for name, weight in slow.items())

    # No home folder, a read-only one, one that belongs to somebody else; and a cache whose folder exists.
    for error in (FileNotFoundError(2, "x"), OSError(30, "x"), PermissionError(13, "x"), NotADirectoryError(20, "x")):

        def refuse(*names: str, error: OSError = error) -> Path:
            raise error

        monkeypatch.setattr(huggingface_hub, "cached_assets_path", refuse)
        check()
    empty = cache.parent / "empty"
    empty.mkdir()
    monkeypatch.setattr(huggingface_hub, "cached_assets_path", lambda *names: empty)
    with monkeypatch.context() as patch:
        patch.setattr(loading.os, "access", lambda path, mode: Path(path) != empty)
        check()
    assert not list(empty.iterdir())
    monkeypatch.setattr(loading, "_LARGEST", 10)
    monkeypatch.setattr(huggingface_hub, "cached_assets_path", lambda *names: pytest.fail("asked for"))
    assert loading.load_tokenizer(section)("ab")["input_ids"] == [7]


def test_a_gguf_file_that_lacks_a_weight_is_refused_and_nothing_kept(section: schema.Model, cache: Path) -> None:
    write_gguf(Path(section.name) / "tiny.gguf", lacking="ffn_down")
    for _ in range(2):
        with pytest.raises(UserError, match=r"lacks 1 of the \d+ weights .*: model\.layers\.0\.mlp\.down_proj\.weight"):
            loading.load_model(section, "float32")
    assert not [path for path in cache.rglob("*") if path.is_file()]


def install(folder: Path, name: str, files: dict[str, bytes], requires: tuple[str, ...] = ()) -> None:
    """Put an installed package of data files into a folder; importing it fails."""
    info, package = folder / f"{name}-1.0.dist-info", folder / name
    info.mkdir(parents=True), package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('the code of a data package was run')\n")
    for file, content in files.items():
        (package / file).write_bytes(content)
    lines = [f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0", *(f"Requires-Dist: {other}" for other in requires)]
    (info / "METADATA").write_text("\n".join([*lines, ""]))
    names = [f"{name}/__init__.py", *(f"{name}/{file}" for file in files), f"{info.name}/METADATA"]
    (info / "RECORD").write_text("".join(f"{path},,\n" for path in names))


@pytest.fixture
def in_parts(section: schema.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> schema.Model:
    """The file of `section` in three parts, in three packages, of which the first requires the others."""
    content, site = (Path(section.name) / "tiny.gguf").read_bytes(), tmp_path / "site"
    cuts = [0, len(content) // 3, len(content) // 2, len(content)]
    parts = [content[first:last] for first, last in zip(cuts, cuts[1:], strict=False)]
    for number, part in enumerate(parts):
        others = ("parts_1", "parts_2", "unrelated; extra == 'run'") if number == 0 else ()
        install(site, f"parts_{number}", {f"tiny.gguf.part{number:02d}": part}, others)
    monkeypatch.syspath_prepend(str(site))
    digest = hashlib.sha256(content).hexdigest()
    return section.model_copy(update={"source": "package", "name": "parts_0", "sha256": digest})


def test_a_file_in_parts_is_joined_and_none_of_the_packages_code_is_run(
    section: schema.Model, in_parts: schema.Model, cache: Path
) -> None:
    whole, joined = (loading.load_model(one, "float32").state_dict() for one in (section, in_parts))
    assert whole.keys() == joined.keys() and all(torch.equal(whole[name], joined[name]) for name in whole)
    assert loading.load_tokenizer(in_parts)("ab c")["input_ids"] == loading.load_tokenizer(section)("ab c")["input_ids"]
    assert not [path for path in cache.rglob("*") if path.suffix == ".gguf"]


def test_parts_that_are_not_the_file_are_refused(in_parts: schema.Model, cache: Path, tmp_path: Path) -> None:
    wrong = in_parts.model_copy(update={"sha256": "0" * 64})
    with pytest.raises(UserError, match=r"model\.sha256: tiny\.gguf.* has the SHA-256 .*, expected 0000"):
        loading.load_model(wrong, "float32")
    assert not [path for path in cache.rglob("*") if path.is_file()]
    second = tmp_path / "site" / "parts_1"
    (second / "tiny.gguf.part01").unlink()
    (second.parent / "parts_1-1.0.dist-info" / "RECORD").write_text("parts_1/__init__.py,,\n")
    with pytest.raises(UserError, match=r"model\.name: 'parts_0' holds 'tiny\.gguf' in parts, and part 1 is missing"):
        loading.load_tokenizer(in_parts)
    shutil.rmtree(second.parent / "parts_1-1.0.dist-info")
    with pytest.raises(UserError, match="part 1 is missing; install parts_1"):
        loading.load_tokenizer(in_parts)


def test_the_checksum_of_a_whole_file_is_checked(section: schema.Model, cache: Path) -> None:
    content = (Path(section.name) / "tiny.gguf").read_bytes()
    right = section.model_copy(update={"sha256": hashlib.sha256(content).hexdigest()})
    assert loading.load_tokenizer(right)("ab")["input_ids"] == [7]
    with pytest.raises(UserError, match=r"model\.sha256: tiny\.gguf has the SHA-256"):
        loading.load_tokenizer(section.model_copy(update={"sha256": "1" * 64}))


def test_without_a_cache_parts_cannot_be_joined_and_the_message_says_what_to_set(
    in_parts: schema.Model, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*names: str) -> Path:
        raise PermissionError(13, "Permission denied", "/root/cache")

    monkeypatch.setattr(huggingface_hub, "cached_assets_path", refuse)
    with pytest.raises(UserError, match="set HF_HOME to a writable folder"):
        loading.load_model(in_parts, "float32")


def test_what_a_package_requires_for_its_code_is_not_asked_for(
    section: schema.Model, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = (Path(section.name) / "tiny.gguf").read_bytes()
    others = ("no-such-runtime>=2", "pywin32; sys_platform == 'win32'", "pytest; extra=='test'", "second")
    install(tmp_path / "site", "first", {"tiny.gguf.part1": content[:100]}, others)
    install(tmp_path / "site", "second", {"tiny.gguf.part2": content[100:]})
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    known = {"source": "package", "name": "first", "sha256": hashlib.sha256(content).hexdigest()}
    assert loading.load_tokenizer(section.model_copy(update=known))("ab")["input_ids"] == [7]
    install(tmp_path / "site", "third", {"tiny.gguf.part01": b"other"})
    metadata = tmp_path / "site/second-1.0.dist-info/METADATA"
    metadata.write_text(metadata.read_text().rstrip() + "\nRequires-Dist: third\n\n")
    with pytest.raises(UserError, match="model.sha256: tiny.gguf.part1 has the SHA-256 .*; install no-such-runtime"):
        loading.load_tokenizer(section.model_copy(update=known | {"sha256": "0" * 64}))
    install(tmp_path / "site", "fourth", {"tiny.gguf.part1": b"a", "tiny.gguf.part01": b"b"})
    with pytest.raises(UserError, match="part 1 occurs twice"):
        loading.load_tokenizer(section.model_copy(update=known | {"name": "fourth"}))


def test_a_checksum_of_nothing_is_refused(section: schema.Model, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="model.sha256: it applies only to a local file model.gguf_file"):
        loading.load_model(section.model_copy(update={"gguf_file": None, "sha256": "0" * 64}), "float32")
    monkeypatch.setattr(loading, "_LARGEST", 10)
    with pytest.raises(UserError, match="model.sha256: tiny.gguf has the SHA-256"):
        loading.load_model(section.model_copy(update={"sha256": "0" * 64}), "float32")
