"""A GGUF file is unpacked once, into the same model and tokenizer that transformers reads from it."""

from pathlib import Path

import gguf
import huggingface_hub
import numpy as np
import pytest
import torch
import transformers

from babelscope import sections
from babelscope.errors import UserError
from babelscope.models import loading

WORDS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "c", "Ġ", "ab", "Ġc"]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"

    def place(*names: str) -> Path:
        (folder.joinpath(*names)).mkdir(parents=True, exist_ok=True)
        return folder.joinpath(*names)

    monkeypatch.setattr(huggingface_hub, "cached_assets_path", place)
    return folder


@pytest.fixture
def section(tmp_path: Path) -> sections.Model:
    """A Llama of one block with packed weights (Q8_0) and a byte-level tokenizer, in one GGUF file."""
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
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
    tensors = {f"blk.0.{name}.weight": shape for name, shape in shapes.items()}
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
    known = {"source": "huggingface", "name": str(tmp_path), "gguf_file": "tiny.gguf", "revision": None}
    return sections.Model(**known, quantization=None, trust_remote_code=False)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_kept_is_what_transformers_reads(section: sections.Model, cache: Path, dtype: str) -> None:
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
    section: sections.Model, cache: Path, monkeypatch: pytest.MonkeyPatch
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


def test_a_damaged_file_is_refused_and_leaves_nothing_behind(section: sections.Model, cache: Path) -> None:
    (Path(section.name) / "tiny.gguf").write_bytes(b"GGUF but no more")
    with pytest.raises(UserError, match="model.name: cannot load the weights of"):
        loading.load_model(section, "float32")
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_a_cache_that_cannot_be_written_and_a_large_file_are_read_the_slow_way(
    section: sections.Model, cache: Path, monkeypatch: pytest.MonkeyPatch
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
