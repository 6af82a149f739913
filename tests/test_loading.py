"""A GGUF file is unpacked once, into the same model and tokenizer that transformers reads from it."""

import hashlib
import shutil
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
    known = {"source": "huggingface", "name": str(tmp_path), "gguf_file": "tiny.gguf", "sha256": None, "revision": None}
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

    def refuse(*names: str) -> Path:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(huggingface_hub, "cached_assets_path", refuse)
    slow = loading.load_model(section, "float32").state_dict()
    assert all(torch.equal(kept[name], weight) for name, weight in slow.items())
    monkeypatch.setattr(loading, "_LARGEST", 10)
    monkeypatch.setattr(huggingface_hub, "cached_assets_path", lambda *names: pytest.fail("asked for"))
    assert loading.load_tokenizer(section)("ab")["input_ids"] == [7]


def install(folder: Path, name: str, files: dict[str, bytes], requires: tuple[str, ...] = ()) -> None:
    """Put an installed package of data files into a folder; importing it fails."""
    info, package = folder / f"{name}-1.0.dist-info", folder / name
    info.mkdir(parents=True), package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('the code of a data package was run')\n")
    for file, content in files.items():
        (package / file).write_bytes(content)
    lines = [
        f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0",
        *(f"Requires-Dist: {other}==1.0" for other in requires),
    ]
    (info / "METADATA").write_text("\n".join([*lines, ""]))
    names = [f"{name}/__init__.py", *(f"{name}/{file}" for file in files), f"{info.name}/METADATA"]
    (info / "RECORD").write_text("".join(f"{path},,\n" for path in names))


@pytest.fixture
def in_parts(section: sections.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> sections.Model:
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
    section: sections.Model, in_parts: sections.Model, cache: Path
) -> None:
    whole, joined = (loading.load_model(one, "float32").state_dict() for one in (section, in_parts))
    assert whole.keys() == joined.keys() and all(torch.equal(whole[name], joined[name]) for name in whole)
    assert loading.load_tokenizer(in_parts)("ab c")["input_ids"] == loading.load_tokenizer(section)("ab c")["input_ids"]
    assert not [path for path in cache.rglob("*") if path.suffix == ".gguf"]


def test_parts_that_are_not_the_file_are_refused(in_parts: sections.Model, cache: Path, tmp_path: Path) -> None:
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
    with pytest.raises(UserError, match="the package 'parts_1' is not installed; install it"):
        loading.load_tokenizer(in_parts)


def test_the_checksum_of_a_whole_file_is_checked(section: sections.Model, cache: Path) -> None:
    content = (Path(section.name) / "tiny.gguf").read_bytes()
    right = section.model_copy(update={"sha256": hashlib.sha256(content).hexdigest()})
    assert loading.load_tokenizer(right)("ab")["input_ids"] == [7]
    with pytest.raises(UserError, match=r"model\.sha256: tiny\.gguf has the SHA-256"):
        loading.load_tokenizer(section.model_copy(update={"sha256": "1" * 64}))


def test_without_a_cache_parts_cannot_be_joined_and_the_message_says_what_to_set(
    in_parts: sections.Model, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*names: str) -> Path:
        raise PermissionError(13, "Permission denied", "/root/cache")

    monkeypatch.setattr(huggingface_hub, "cached_assets_path", refuse)
    with pytest.raises(UserError, match="set HF_HOME to a folder that can be written"):
        loading.load_model(in_parts, "float32")
