"""Training from a running forward pass: the batches, exact resume, transcoders, and the counts against stored ones."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
import transformers
from closure import ROOT

from babelscope import config
from babelscope.activations import extraction, store
from babelscope.activations.batches import Batches, Pair
from babelscope.activations.streaming import Stream
from babelscope.config.schema import Hardware, Train
from babelscope.core.errors import UserError
from babelscope.core.files import copy_file
from babelscope.features.count import count
from babelscope.features.counter import Counter, whole_texts
from babelscope.models import forward, hookpoints, probing, tokens
from babelscope.models.names import input_name, module_of
from babelscope.sae.checkpoint import load, save
from babelscope.sae.metrics import quality
from babelscope.sae.training import loop
from babelscope.sae.training.loop import train

HARDWARE = Hardware(
    accelerator="cpu", devices=1, num_nodes=1, strategy="auto", threads=0, checkpoint_seconds=0, parallel=1
)
NAMES = ["layers.0.mlp", "layers.2"]
SETTINGS = Train(
    source="stream", activation="topk", matryoshka=None, transcode=False,
    latents=64, k=4, tokens=32 * 40, batch=32, learning_rate=0.004, warmup=0.05, decay=0.2, encoder_scale=0.5,
    aux_k_coefficient=0.03125, weight_decay=0.0, dead_after=10**6, log_every=5,
)  # fmt: skip


def make_model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=99,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=24,
        initializer_range=0.3,
    )
    return transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model()


def tokenized(count: int = 60) -> list[tokens.TokenizedText]:
    """Texts of 1 to 12 own tokens behind one special token; each begins with another, so that no two rows are alike."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(2, 99, (count, 12), generator=generator).tolist()
    return [tokens.TokenizedText(f"t{i * 37 % count:03d}", (1, 2 + i, *ids[i][: i * 5 % 12]), 1) for i in range(count)]


def corpus_of(texts: list[tokens.TokenizedText]) -> tokens.TokenizedTexts:
    """The texts, all behind the same special tokens, as they come from a corpus."""
    frame = pl.DataFrame(
        {"text_id": [text.text_id for text in texts], "token_ids": [list(text.ids[text.special :]) for text in texts]},
        schema={"text_id": pl.String, "token_ids": pl.List(pl.Int32)},
    )
    return tokens.TokenizedTexts(frame, texts[0].ids[: texts[0].special])


def stream(model: Any, settings: Train = SETTINGS, **changes: Any) -> Stream:
    options: dict[str, Any] = {
        "transcode": settings.transcode, "dtype": torch.float16, "batch_tokens": 64, "size": settings.batch,
        "steps": settings.tokens // settings.batch, "seed": 7, "block_rows": 100,
    }  # fmt: skip
    return Stream(model, corpus_of(tokenized()), NAMES, **{**options, **changes})


def flat(batches: Iterator[list[Pair]]) -> list[torch.Tensor]:
    """Every batch as [rows, all numbers of all hookpoints]."""
    return [torch.cat([part for pair in batch for part in pair if part is not None], 1) for batch in batches]


def sorted_rows(x: torch.Tensor) -> list[list[float]]:
    return sorted(x.double().tolist())


def test_a_tokenized_corpus_holds_the_texts_and_its_batches_are_those_of_the_list(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    texts = tokenized()
    monkeypatch.setattr(tokens, "_CHUNK", 7)
    corpus = corpus_of([*texts[:30], tokens.TokenizedText("empty", (1,), 1), *texts[30:]])
    assert list(corpus) == corpus[range(len(corpus))] == texts
    assert corpus.lengths.tolist() == [text.content_tokens for text in texts]
    assert [corpus[numbers] for numbers in corpus.batches(64)] == tokens.batches(tokens.by_length(texts), 64)
    some = tokens.batches(tokens.by_length([texts[8], texts[3], texts[41]]), 64)
    assert [corpus[numbers] for numbers in corpus.batches(64, [8, 3, 41])] == some


@pytest.mark.parametrize("block_rows", [20, 100, 5000])
def test_every_token_is_seen_once_per_epoch_in_another_order(model: Any, block_rows: int) -> None:
    texts = tokenized()
    alone = [
        forward.content_activations(model, NAMES, forward.collate([text]), torch.float16) for text in texts
    ]  # fmt: skip
    expected = torch.cat([torch.cat(list(rows.values()), 1) for rows in alone])
    size = len(expected) // 8
    assert len(expected) == 8 * size + 6  # an epoch ends inside a batch
    source = stream(model, size=size, steps=40, block_rows=block_rows)
    rows = torch.cat(flat(source.read()))
    assert rows.shape == (40 * size, 32)
    first, second = rows[: len(expected)], rows[len(expected) : 2 * len(expected)]
    assert not torch.equal(first, second)
    for epoch in (first, second):
        found, wanted = torch.tensor(sorted_rows(epoch)), torch.tensor(sorted_rows(expected))
        torch.testing.assert_close(found, wanted, rtol=2e-3, atol=2e-3)
        # Each is the nearest to its own and to no other: nothing stands twice, nothing is missing.
        nearest = torch.cdist(epoch.float(), expected.float()).argmin(1)
        assert torch.equal(nearest.sort().values, torch.arange(len(expected)))


@pytest.mark.parametrize("first", [1, 3, 4, 11, 29])
def test_batches_are_a_pure_function_of_their_number(model: Any, first: int) -> None:
    whole = flat(stream(model, steps=30).read())
    assert len(whole) == 30
    resumed = stream(model, steps=30)
    resumed.moments()
    found = flat(resumed.read(first))
    assert len(found) == 30 - first
    assert all(torch.equal(a, b) for a, b in zip(found, whole[first:], strict=True))
    other = flat(islice(stream(model, steps=30, seed=8).read(), 1))
    assert not torch.equal(other[0], whole[0])


def test_nothing_is_computed_beyond_what_is_read(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[int] = []
    compute = Stream._compute
    monkeypatch.setattr(Stream, "_compute", lambda self, n: computed.append(len(n)) or compute(self, n))
    source = stream(model, steps=3)  # 96 rows of a first block of about 100
    source.moments()
    assert len(list(source.read())) == 3
    assert len(computed) == 1
    assert list(stream(model, steps=3).read(3)) == []
    assert len(computed) == 1


def test_devices_share_the_same_global_batch(model: Any) -> None:
    whole = flat(stream(model, steps=6).read())
    shares = [flat(stream(model, steps=6).read(2, rank, 4)) for rank in range(4)]
    for number, parts in enumerate(zip(*shares, strict=True), start=2):
        assert all(len(part) == 8 for part in parts)
        assert sorted_rows(torch.cat(parts)) == sorted_rows(whole[number])


def test_moments_are_those_of_the_first_block(model: Any) -> None:
    source = stream(model, block_rows=5000, steps=1)
    found = source.moments()
    everything = torch.cat(flat(stream(model, size=source.rows, steps=1).read())).double()
    for number, (target, inputs) in enumerate(found):
        x = everything[:, 16 * number : 16 * number + 16]
        assert inputs is None
        torch.testing.assert_close(target.mean.double(), x.mean(0), rtol=1e-3, atol=1e-4)
        assert target.scale == pytest.approx(float((16 / x.square().sum(1).mean()) ** 0.5), rel=1e-3)


def silent(step: int, metrics: Mapping[str, float]) -> None:
    pass


def run(model: Any, folder: Path, settings: Train = SETTINGS, write: Any = silent) -> list[bytes]:
    trained = train(stream(model, settings), settings, HARDWARE, seed=1, write=write, folder=folder)
    assert trained is not None
    for name, (sae, _) in zip(NAMES, trained, strict=True):
        save(sae, folder / name, {"model_name": "tiny", "hook_name": name})
    return [(folder / name / "sae_weights.safetensors").read_bytes() for name in NAMES]


@pytest.mark.parametrize("changes", [{}, {"transcode": True}, {"activation": "batchtopk"}], ids=str)
def test_a_killed_run_resumes_to_the_same_bytes_at_every_hookpoint(
    model: Any, tmp_path: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "_APART", 0)  # a checkpoint after every step
    settings = SETTINGS.model_copy(update=changes)
    whole = run(model, tmp_path / "whole", settings)

    def stop_at_30(step: int, metrics: Mapping[str, float]) -> None:
        if step == 30:
            raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run(model, tmp_path / "killed", settings, stop_at_30)
    again: list[int] = []
    resumed = run(model, tmp_path / "killed", settings, lambda step, metrics: again.append(step))
    assert again == [30, 35, 40]  # from the checkpoint of step 29
    assert resumed == whole


def in_two_languages() -> tokens.TokenizedTexts:
    """Texts of both splits in both languages."""
    plain = corpus_of(tokenized())
    ordered = plain.frame["text_id"].to_frame().with_columns(length=plain.frame["tokens"]).sort("length", "text_id")
    of = ordered.select(
        "text_id",
        language=pl.when(pl.col("text_id") < "t020").then(pl.lit("no")).otherwise(pl.lit("en")),
        split=pl.when(pl.int_range(pl.len()) % 4 == 0).then(pl.lit("eval")).otherwise(pl.lit("train")),
    )
    return tokens.TokenizedTexts(plain.frame.join(of, on="text_id", maintain_order="left"), plain.special)


def extracted(model: Any, folder: Path, transcode: bool) -> tuple[pl.DataFrame, dict[str, store.ActivationStore]]:
    """The token table and the stores that `extract` would leave of the same texts."""
    texts = in_two_languages()
    shards, names = extraction.plan(texts, 64, 50), forward.names_to_read(NAMES, transcode)
    assert extraction.extract(model, texts, shards, names, folder, "float16", HARDWARE)
    for name in names:
        place = folder / name
        store.write_index(place, [shard.rows for shard in shards], 16, "float16", "tiny", name)
    stores = {name: store.ActivationStore(folder / name) for name in names}
    return extraction.token_table(texts, shards), stores


@pytest.mark.parametrize("transcode", [False, True])
def test_counts_and_quality_are_those_of_stored_activations(model: Any, tmp_path: Path, transcode: bool) -> None:
    settings = SETTINGS.model_copy(update={"transcode": transcode})
    run(model, tmp_path, settings)
    saes = {name: load(tmp_path, name) for name in NAMES}
    table, stores = extracted(model, tmp_path / "store", transcode)
    languages, texts = ["en", "no"], in_two_languages()
    done: list[int] = []
    measured = count(
        model, texts, saes, languages, dtype=torch.float16, batch_tokens=64, chunk_tokens=40, advance=done.append
    )
    assert sum(done) == len(table) and max(done) <= 40
    rows = {split: table.filter(split=split) for split in ("train", "eval")}
    code = {split: part["language"].replace_strict({"en": 0, "no": 1}).to_torch() for split, part in rows.items()}
    text = rows["train"]["text_id"].rle_id().cast(pl.Int64).to_torch()
    for name, sae in saes.items():
        inputs = stores[input_name(name, True)] if transcode else None
        counter = Counter(languages, sae.latents)
        for start, end in whole_texts(text, 40):
            values, indices = sae.encode((inputs or stores[name]).gather(rows["train"]["row"].to_torch()[start:end]))
            counter.add(values, indices, code["train"][start:end], text[start:end])
        expected = counter.frame(hookpoints.layer_of(name))
        assert measured[name].counts.equals(expected) and len(expected) > 20
        by_language = rows["train"].group_by("language").agg(pl.len(), pl.col("text_id").n_unique()).sort("language")
        assert measured[name].totals.rows() == by_language.rows()
        wanted = quality(sae, stores[name], rows["eval"]["row"].to_torch(), code["eval"], 2, inputs)
        assert measured[name].quality.figures(languages) == pytest.approx(wanted.figures(languages), rel=1e-5)


def test_a_transcoder_encodes_the_input_of_the_module(model: Any, tmp_path: Path) -> None:
    """Row for row: the module, applied to the stored inputs, gives the stored outputs."""
    _, stores = extracted(model, tmp_path, transcode=True)
    x, y = (stores[name].gather(torch.arange(stores[name].rows)) for name in ("layers.0.mlp/input", "layers.0.mlp"))
    with torch.no_grad():
        torch.testing.assert_close(model.base_model.layers[0].mlp(x.float()), y.float(), rtol=1e-2, atol=5e-3)
    assert (tmp_path / "layers.0.mlp/input/shard-00000.safetensors").is_file()
    [(x, target, _)] = stream(model, SETTINGS.model_copy(update={"transcode": True})).read().__next__()[:1]
    assert target is not None
    with torch.no_grad():
        torch.testing.assert_close(model.base_model.layers[0].mlp(x.float()), target.float(), rtol=1e-2, atol=5e-3)


def test_the_input_of_a_block_is_read_though_it_comes_by_name_and_the_pass_ends_there(model: Any) -> None:
    ids = torch.tensor([[3, 4, 5]])
    seen = hookpoints.read(model, ["layers.1.input", "layers.0"], input_ids=ids)
    assert torch.equal(seen["layers.1.input"], seen["layers.0"])
    attention = hookpoints.read(model, ["layers.1.self_attn.input"], input_ids=ids)["layers.1.self_attn.input"]
    torch.testing.assert_close(attention, model.base_model.layers[1].input_layernorm(seen["layers.0"]))
    with pytest.raises(UserError, match=r"the model has no 'layers.9.mlp'"):
        hookpoints.read(model, ["layers.9.mlp.input"], input_ids=ids)


def test_the_input_of_a_module_can_be_changed(model: Any) -> None:
    """By position as in `o_proj`, and by name as in a block, whose input is the output of the block below."""
    ids, heads = torch.tensor([[3, 4, 5]]), "layers.1.self_attn.o_proj.input"
    assert hookpoints.read(model, [heads], input_ids=ids)[heads].shape[:2] == (1, 3)
    with hookpoints.editing(model, {heads: lambda x: x * 0}):
        assert not hookpoints.read(model, ["layers.1.self_attn"], input_ids=ids)["layers.1.self_attn"].any()
    logits = []
    for name in ("layers.1.input", "layers.0"):
        with hookpoints.editing(model, {name: lambda x: x + 1}), torch.no_grad():
            logits.append(model(input_ids=ids).logits)
    assert torch.equal(*logits)
    assert not torch.equal(logits[0], model(input_ids=ids).logits)
    assert probing.stays_in_place(model, heads) and not probing.stays_in_place(model, "layers.1.input")


def test_a_transcoder_after_gemma_s_norm_encodes_the_input_of_the_mlp() -> None:
    name = input_name("layers.3.post_feedforward_layernorm", True)
    assert module_of(name) == ("layers.3.mlp", True)
    assert module_of(input_name("layers.3.mlp", True)) == module_of("layers.3.mlp.input") == ("layers.3.mlp", True)
    assert module_of("layers.3.mlp") == ("layers.3.mlp", False)
    with pytest.raises(UserError, match="'layers.3.mlp.input' is the input of a module, .* allowed: 'layers.3.mlp'"):
        content = config.read_yaml(ROOT / "params.yaml") | {"hookpoints": ["layers.3.mlp.input"]}
        content["train"] |= {"transcode": True}
        content["stability"] |= {"hookpoints": []}
        content["ablate"] |= {"methods": ["directional"]}
        config.parse(content)


def test_batches_of_stored_activations_have_the_same_interface(model: Any, tmp_path: Path) -> None:
    table, stores = extracted(model, tmp_path, transcode=False)
    stored = Batches(stores[NAMES[0]], table["row"].to_torch(), len(table), 1, seed=0)
    [[(x, y, _)]] = stored.read()
    [[(streamed, none, _), _]] = stream(model, size=len(table), steps=1).read()
    assert y is None and none is None and x.dtype == streamed.dtype
    torch.testing.assert_close(
        torch.tensor(sorted_rows(x)), torch.tensor(sorted_rows(streamed)), rtol=2e-3, atol=2e-3
    )  # fmt: skip


def test_activations_that_do_not_fit_are_refused(model: Any) -> None:
    with (
        hookpoints.editing(model, {"layers.0": lambda x: x * 1e9}),
        pytest.raises(UserError, match="store_dtype: activations at layers.2 do not fit"),
    ):
        next(stream(model).read())


def test_in_stored_mode_the_stage_does_nothing_and_does_it_without_torch(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(
        (ROOT / "params.yaml").read_text().replace("source: stream", "source: stored")
    )
    (tmp_path / "data/stream/layers.0.mlp").mkdir(parents=True)
    code = "import sys, runpy; runpy.run_path(sys.argv[1], run_name='__main__'); assert 'torch' not in sys.modules"
    subprocess.run(
        [sys.executable, "-c", code, str(ROOT / "stages/stream.py")], cwd=tmp_path, check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )  # fmt: skip
    [left] = (tmp_path / "data/stream").iterdir()
    assert json.loads(left.read_text()) == {"source": "stored"}


def test_what_was_streamed_is_published_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"weights")
    copy_file(tmp_path / "a", tmp_path / "sae/b")
    assert (tmp_path / "sae/b").read_bytes() == b"weights"
    with pytest.raises(UserError, match="c: no such file; .* dvc repro"):
        copy_file(tmp_path / "c", tmp_path / "b")


def test_widths_are_those_of_what_is_read(model: Any) -> None:
    names = forward.names_to_read(["layers.1.mlp", "layers.1.mlp.act_fn"], transcode=True)
    assert forward.widths(model, names) == {
        "layers.1.mlp": 16, "layers.1.mlp.act_fn": 24, "layers.1.mlp/input": 16, "layers.1.mlp.act_fn/input": 24,
    }  # fmt: skip
