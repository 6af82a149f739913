"""Firings of neurons: counted by hand on a tiny model, resumed after a kill; the stage that has nothing to count."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
import transformers
from closure import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from babelscope import config
from babelscope.core.errors import UserError
from babelscope.features import neurons
from babelscope.features.counter import Counter
from babelscope.models import forward, hookpoints, tokens

NAMES = ["layers.0.mlp.act_fn", "layers.2.mlp.act_fn"]
LANGUAGES = ["no", "en", "zh-CN"]
NEURONS = 24


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 40), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_counts_of_every_unit_are_those_of_single_firings(seed: int, rows: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(seed)
    text = torch.randint(5, 13, (rows,), generator=g).sort().values
    x, language = torch.randn(rows, 6, generator=g).round(decimals=1).to(dtype), text % 3
    sparse, dense = Counter(LANGUAGES, 6), Counter(LANGUAGES, 6)
    for part in (text < 9, text >= 9):
        sparse.add(x[part], torch.arange(6).expand(int(part.sum()), 6), language[part], text[part])
        dense.add_dense(x[part], language[part], text[part])
    exact, sums = pl.exclude("sum"), pl.col("sum")
    assert dense.frame(1).select(exact).equals(sparse.frame(1).select(exact))
    assert dense.frame(1).select(sums.round(9)).equals(sparse.frame(1).select(sums.round(9)))


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    llama = transformers.LlamaConfig(
        vocab_size=99, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=NEURONS,
        initializer_range=0.3,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(llama).eval().requires_grad_(False)


def tokenized(count: int = 20) -> list[tokens.TokenizedText]:
    """Texts of 1 to 9 own tokens behind one special token."""
    return [tokens.TokenizedText(f"t{i:02d}", (1, *((7 * i + 3 * j) % 97 + 2 for j in range(i % 9 + 1))), 1)
            for i in range(count)]  # fmt: skip


def corpus() -> tokens.TokenizedTexts:
    """The texts in two languages, by turns."""
    frame = pl.DataFrame(
        {
            "text_id": [text.text_id for text in tokenized()],
            "language": [LANGUAGES[number % 2] for number in range(20)],
            "token_ids": [list(text.ids[1:]) for text in tokenized()],
        }
    )
    return tokens.TokenizedTexts(frame, [1])


def count(model: Any, checkpoint: Path) -> dict[str, pl.DataFrame]:
    found = neurons.count(
        model, corpus(), NAMES, LANGUAGES, dtype=torch.float32, batch_tokens=32, checkpoint=checkpoint
    )
    assert list(found) == NAMES and all(counter.units == NEURONS for counter in found.values())
    return {name: counter.frame(hookpoints.layer_of(name)) for name, counter in found.items()}


def test_a_neuron_fires_where_the_activation_function_gives_more_than_0(model: Any, tmp_path: Path) -> None:
    found = count(model, tmp_path / "none.safetensors")
    mlps = [model.model.layers[0].mlp, model.model.layers[2].mlp]
    for mlp, (name, frame) in zip(mlps, found.items(), strict=True):
        cells: dict[tuple[str, int], list[list[float]]] = {}
        for number, text in enumerate(tokenized()):
            gates = []
            hook = mlp.gate_proj.register_forward_hook(lambda _m, _x, gate, to=gates: to.append(gate))
            model(input_ids=torch.tensor([text.ids]))
            hook.remove()
            gate = gates[0][0, text.special :]
            for unit in range(NEURONS):
                positive = [g / (1 + torch.tensor(-g).exp().item()) for g in gate[:, unit].tolist() if g > 0]  # SiLU
                if positive:
                    cells.setdefault((LANGUAGES[number % 2], unit), []).append(positive)
        assert frame.columns == ["layer", "unit", "language", "tokens", "texts", "sum", "max", "min_positive"]
        assert frame["layer"].unique().to_list() == [hookpoints.layer_of(name)]
        assert {(row["language"], row["unit"]) for row in frame.iter_rows(named=True)} == cells.keys()
        for row in frame.iter_rows(named=True):
            texts = cells[row["language"], row["unit"]]
            values = [value for text in texts for value in text]
            assert (row["tokens"], row["texts"]) == (len(values), len(texts))
            measured = [row["sum"], row["max"], row["min_positive"]]
            assert measured == pytest.approx([sum(values), max(values), min(values)], rel=1e-4, abs=1e-6)


def test_a_killed_count_goes_on_and_gives_the_same_tables(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = count(model, tmp_path / "whole.safetensors")
    assert not list(tmp_path.iterdir())  # shorter than SAVE_EVERY
    monkeypatch.setattr(neurons, "SAVE_EVERY", 0.0)
    read, passes = forward.content_activations, []

    def killed_at_4(*args: Any) -> Any:
        passes.append(1)
        if len(passes) == 4:
            raise KeyboardInterrupt
        return read(*args)

    checkpoint = tmp_path / "folder" / "counts.safetensors"
    monkeypatch.setattr(forward, "content_activations", killed_at_4)
    with pytest.raises(KeyboardInterrupt):
        count(model, checkpoint)
    resumed = count(model, checkpoint)
    batches = tokens.batches(tokens.by_length(tokenized()), 32)
    assert len(passes) == len(batches) + 1  # the killed pass alone is repeated
    assert all(resumed[name].equals(whole[name]) for name in NAMES)


def test_unknown_hookpoints_name_the_key_that_they_stand_in(model: Any) -> None:
    with pytest.raises(
        UserError, match=r"neurons\.hookpoints: the model has no 'layers\.9\.mlp\.act_fn'; nearest: layers"
    ):
        hookpoints.resolve(model, ["layers.9.mlp.act_fn"], "neurons.hookpoints")


def test_a_hookpoint_that_does_not_give_one_vector_per_token_is_refused(tmp_path: Path) -> None:
    qwen3 = transformers.Qwen3Config(
        vocab_size=99, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        intermediate_size=NEURONS,
    )  # fmt: skip
    qwen = transformers.AutoModelForCausalLM.from_config(qwen3).eval().requires_grad_(False)
    with pytest.raises(
        UserError, match=r"'layers.1.self_attn.q_norm' does not give one vector per token, but \[.*, 2, 8\]"
    ):
        neurons.count(
            qwen, corpus(), ["layers.1.self_attn.q_norm"], LANGUAGES,
            dtype=torch.float32, batch_tokens=32, checkpoint=tmp_path / "none",
        )  # fmt: skip


def test_a_corpus_is_tokenized_as_its_texts_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def tokenizer(texts: Any, return_special_tokens_mask: bool = False, **_: Any) -> dict[str, Any]:
        if return_special_tokens_mask:
            return {"input_ids": [1, 5], "special_tokens_mask": [1, 0]}
        return {"input_ids": [[len(word) for word in text.split()] for text in texts]}

    corpus = pl.DataFrame({"text_id": ["a", "b", "c"], "text": ["one three", "", "seven eleven of"]})
    monkeypatch.setattr(tokens, "_CHUNK", 2)
    texts = tokens.tokenize_corpus(tokenizer, corpus, max_tokens=2)
    assert [(text.text_id, text.ids, text.special) for text in texts] == [("a", (1, 3, 5), 1), ("c", (1, 5, 6), 1)]


def test_without_hookpoints_the_stage_writes_empty_tables_and_loads_nothing(tmp_path: Path) -> None:
    content = config.read_yaml(ROOT / "params.yaml")
    content["neurons"]["hookpoints"] = []
    (tmp_path / "params.yaml").write_text(json.dumps(content))  # which is YAML, too
    stale = tmp_path / "data/neurons/layers.1.mlp.act_fn.parquet"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"of other params")
    program = (
        f"import runpy, sys; runpy.run_path({str(ROOT / 'stages/neurons.py')!r}, run_name='__main__')\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={"PYTHONPATH": str(ROOT / "src")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == "neurons: none to count (params.yaml: neurons.hookpoints)\n"
    assert {path.name for path in stale.parent.iterdir()} == {"totals.parquet", "widths.json"}
    totals = pl.read_parquet(stale.parent / "totals.parquet")
    assert totals.schema == {"language": pl.String, "tokens": pl.Int64, "texts": pl.Int64} and totals.is_empty()
    assert json.loads((stale.parent / "widths.json").read_text()) == {}
