"""The arithmetic of docs/scaling.md: its tables are what the script prints, its formulas what models and files have."""

from pathlib import Path

import arithmetic
import pytest
import torch
import transformers
from closure import ROOT

from babelscope.activations import store
from babelscope.models.hookpoints import blocks


def test_the_page_has_the_tables_that_the_script_prints() -> None:
    text = (ROOT / "docs/scaling.md").read_text(encoding="utf-8")
    first, last = "<!-- python tools/arithmetic.py -->\n", "\n<!-- end -->"
    assert text.partition(first)[2].partition(last)[0] == arithmetic.page()


@pytest.mark.parametrize("shape", arithmetic.SHAPES, ids=lambda shape: shape.name)
def test_flops_are_two_for_each_weight_of_the_blocks_and_attention(shape: arithmetic.Shape) -> None:
    config = transformers.LlamaConfig(
        hidden_size=shape.d, intermediate_size=shape.inner, num_hidden_layers=shape.blocks,
        num_attention_heads=shape.heads, num_key_value_heads=shape.key_heads, vocab_size=16,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    weights = sum(module.weight.numel() for module in blocks(model).modules() if isinstance(module, torch.nn.Linear))
    # On average a token sees half of its text: a score and a weighted sum over d numbers for each of those.
    attention = shape.blocks * (arithmetic.LENGTH / 2) * 2 * 2 * shape.d
    assert shape.forward == 2 * weights + attention


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_bytes_are_those_of_the_files(dtype: str, tmp_path: Path) -> None:
    shape = arithmetic.Shape("toy", d=64, inner=128, blocks=1, heads=4, key_heads=2, latents=256)
    store.write_shard(tmp_path, 0, torch.randn(4096, 64).half(), quantised=dtype == "int8")
    size = (tmp_path / store.shard_name(0)).stat().st_size
    assert size == pytest.approx(4096 * shape.stored(dtype), abs=1024)  # header, mean and deviation


def test_sizes_and_times_can_be_read() -> None:
    assert [arithmetic.size(n, "B") for n in (512, 6.554e13, 2.62e15)] == ["512 B", "65.5 TB", "2.62 PB"]
    spans = [arithmetic.span(seconds / 3600) for seconds in (0.2, 90, 3600, 40 * 3600, 90 * 86400)]
    assert spans == ["< 1 s", "90 s", "60 min", "40 h", "90 days"]
