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


def test_a_stream_on_eight_devices_by_hand() -> None:
    shape, found = arithmetic.SHAPES[0], arithmetic.divided(arithmetic.SHAPES[0], 8)
    # 14 of 16 hookpoints x 2,048 numbers x 2 bytes, of an eighth of the tokens.
    assert found["each"] == 2 and found["sent"] == 14 * 2048 * 2 / 8
    # A ring sends 2 x 7/8 of 4 bytes per weight and batch.
    assert found["gradients"] == pytest.approx(16 * 2 * 2048 * 131072 * 4 * 2 * 7 / 8 / 8192)
    assert found["memory"] == pytest.approx(2 * 8.59e9 + 2 * shape.weights + 1.34e9 + 2.68e9, rel=1e-3)
    assert 1 / found["repeated"] == pytest.approx(1 / 166815 + 2 / 410308)
    assert 1 / found["divided"] == pytest.approx(1 / 166815 / 8 + 2 / 410308)


def test_sizes_and_times_can_be_read() -> None:
    assert [arithmetic.size(n, "B") for n in (512, 6.554e13, 2.62e15)] == ["512 B", "65.5 TB", "2.62 PB"]
    spans = [arithmetic.span(seconds / 3600) for seconds in (0.2, 90, 3600, 40 * 3600, 90 * 86400)]
    assert spans == ["< 1 s", "90 s", "60 min", "40 h", "90 days"]
