"""The activation store, the extraction plan and the counts, against hand-computed cases and naive loops."""

import polars as pl
import pytest
import safetensors.torch
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from babelscope.activations import extraction, store
from babelscope.activations.rows import read_rows
from babelscope.config.schema import Hardware
from babelscope.core.errors import UserError
from babelscope.core.paths import Paths
from babelscope.features import count
from babelscope.features.counter import Counter, whole_texts
from babelscope.models import hookpoints, tokens
from babelscope.sae import SAE

HARDWARE = Hardware(
    accelerator="cpu", devices=1, num_nodes=1, strategy="auto", threads=0, checkpoint_seconds=0, parallel=1
)


def write_store(folder, *shards):
    for number, shard in enumerate(shards):
        store.write_shard(folder, number, shard)
    store.write_index(folder, [len(s) for s in shards], shards[0].shape[1], "float16", "m", "h")
    return store.ActivationStore(folder)


def test_gather_across_shards(tmp_path):
    x = torch.arange(20, dtype=torch.float16).view(10, 2)
    opened = write_store(tmp_path, x[:4], x[4:5], x[5:])
    assert (opened.rows, opened.d, opened.dtype) == (10, 2, torch.float16)
    order = torch.tensor([9, 0, 4, 3, 5, 4])
    assert torch.equal(opened.gather(order), x[order])
    assert torch.equal(opened.gather(torch.arange(10)), x)


def test_int8_is_off_by_half_a_step_at_most(tmp_path):
    g = torch.Generator().manual_seed(0)
    # Columns of all sizes, one of them constant, and a row as far out as activations have them.
    x = torch.randn(50, 24, generator=g) * torch.logspace(-3, 3, 24) + torch.randn(24, generator=g)
    x[8] *= 100
    x[:, 3] = 5.0
    for number, shard in enumerate((x[:20], x[20:])):
        store.write_shard(tmp_path, number, shard, quantised=True)
    store.write_index(tmp_path, [20, 30], 24, "int8", "m", "h")
    opened = store.ActivationStore(tmp_path)
    every = opened.gather(torch.arange(50))
    assert (opened.dtype, every.dtype, opened.index["dtype"]) == (torch.float32, torch.float32, "int8")
    for found, part in ((every[:20], x[:20]), (every[20:], x[20:])):
        deviation = part.std(0, correction=0)
        step = ((part - part.mean(0)) / deviation.clamp(min=1e-9)).abs().amax(1, keepdim=True) / 127 * deviation
        assert ((found - part).abs() <= 0.501 * step + 1e-6 * part.abs()).all()
    assert torch.equal(every[:, 3], x[:, 3])
    order = torch.tensor([49, 3, 20, 3])
    assert torch.equal(opened.gather(order), every[order])
    assert torch.equal(opened.gather(order.sort().values, torch.empty(4, 24)), every[order.sort().values])
    shapes = {"activations": torch.zeros(20, 24).char(), "scales": torch.zeros(19)}
    shapes |= {name: torch.zeros(24) for name in ("mean", "deviation")}
    safetensors.torch.save_file(shapes, tmp_path / "shard-00000.safetensors")
    with pytest.raises(UserError, match="shard-00000.safetensors: scales, mean, deviation do not have the shapes"):
        store.ActivationStore(tmp_path)


def test_rows_of_both_stages_are_numbered_through(tmp_path):
    paths = Paths(tmp_path)
    x = torch.arange(20).half().view(10, 2)
    for folder, part in ((paths.activations, x[:6]), (paths.extended, x[6:])):
        write_store(folder / "layers.1", part)
    for path, languages in ((paths.tokens, ["en"] * 4 + ["de"] * 2), (paths.extended_tokens, ["nl"] * 4)):
        values = {"row": range(len(languages)), "text_id": "t", "language": languages, "split": "train"}
        pl.DataFrame(values).write_parquet(path)
    found = read_rows(paths, ["de", "nl"])
    assert found["row"].to_list() == [4, 5, 6, 7, 8, 9]
    both = store.opened(paths, "layers.1")
    assert both.rows == 10 and torch.equal(both.gather(found["row"].to_torch()), x[4:])
    assert torch.equal(both.gather(torch.tensor([9, 0, 6, 5])), x[[9, 0, 6, 5]])
    assert read_rows(paths, columns=["text_id"]).shape == (10, 1)


def test_damaged_stores_are_refused_by_name(tmp_path):
    write_store(tmp_path, torch.ones(3, 2).half(), torch.ones(2, 2).half())
    path = tmp_path / "shard-00001.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    with pytest.raises(UserError, match=r"shard-00001.safetensors: missing or corrupt"):
        store.ActivationStore(tmp_path)
    store.write_shard(tmp_path, 1, torch.ones(1, 2).half())
    with pytest.raises(UserError, match=r"shape \(1, 2\), but index.json says \(2, 2\)"):
        store.ActivationStore(tmp_path)
    (tmp_path / "index.json").write_text("{}")
    with pytest.raises(UserError, match=r"index.json: not a store"):
        store.ActivationStore(tmp_path)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=99, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24
    )
    return transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def corpus(count=40):
    frame = pl.DataFrame(
        {
            "text_id": [f"t{i:02d}" for i in range(count)],
            "language": ["en" if i % 2 else "no" for i in range(count)],
            "split": ["eval" if i % 5 == 0 else "train" for i in range(count)],
            "token_ids": [list(range(2, 4 + i * 5 % 13)) for i in range(count)],
        },
        schema_overrides={"token_ids": pl.List(pl.Int32)},
    )
    return tokens.TokenizedTexts(frame, [1])


def test_extraction_follows_the_token_table_and_leaves_special_tokens_out(model, tmp_path):
    texts = corpus()
    names = ["layers.0.mlp", "layers.2"]
    shards = extraction.plan(texts, batch_tokens=64, shard_rows=50)
    assert len(shards) > 2
    assert extraction.extract(model, texts, shards, names, tmp_path, "float16", HARDWARE)
    table = extraction.token_table(texts, shards)
    assert table.columns == ["row", "text_id", "language", "split", "position", "token_id"]
    assert len(table) == sum(t.content_tokens for t in texts) == sum(s.rows for s in shards)
    for name in names:
        store.write_index(tmp_path / name, [s.rows for s in shards], 16, "float16", "m", name)
        opened = store.ActivationStore(tmp_path / name)
        for text in texts[range(0, len(texts), 7)]:
            rows = table.filter(text_id=text.text_id)
            assert rows["token_id"].to_list() == list(text.ids[1:])
            assert rows["position"].to_list() == list(range(text.content_tokens))
            alone = hookpoints.read(model, [name], input_ids=torch.tensor([text.ids]))[name][0, 1:]
            assert torch.allclose(opened.gather(torch.tensor(rows["row"].to_list())).float(), alone, atol=2e-3)


def test_bytes_of_a_hookpoint_do_not_depend_on_the_others_and_finished_shards_are_kept(model, tmp_path):
    texts = corpus()
    shards = extraction.plan(texts, batch_tokens=64, shard_rows=50)
    extraction.extract(model, texts, shards, ["layers.1.mlp"], tmp_path / "one", "float16", HARDWARE)
    extraction.extract(model, texts, shards, ["layers.2", "layers.1.mlp"], tmp_path / "two", "float16", HARDWARE)
    path = "layers.1.mlp/shard-00001.safetensors"
    whole = (tmp_path / "one" / path).read_bytes()
    assert whole == (tmp_path / "two" / path).read_bytes()
    marked = tmp_path / "one/layers.1.mlp/shard-00000.safetensors"
    marked.write_bytes(b"kept")
    (tmp_path / "one" / path).unlink()
    extraction.extract(model, texts, shards, ["layers.1.mlp"], tmp_path / "one", "float16", HARDWARE)
    assert (tmp_path / "one" / path).read_bytes() == whole
    assert marked.read_bytes() == b"kept"


def test_token_table_is_the_same_for_every_batch_size():
    texts = corpus()
    small, large = (extraction.plan(texts, n, 30) for n in (32, 512))
    assert extraction.token_table(texts, small).equals(extraction.token_table(texts, large))


def test_activations_that_do_not_fit_the_dtype_are_refused(model, tmp_path):
    texts = corpus()
    shards = extraction.plan(texts, 64)
    with hookpoints.editing(model, {"layers.0": lambda x: x * 1e9}), pytest.raises(UserError, match="store_dtype"):
        extraction.extract(model, texts, shards, ["layers.0"], tmp_path, "float16", HARDWARE)


def naive_counts(values, indices, language, text, languages):
    cells = {}
    for row, (vs, us) in enumerate(zip(values.tolist(), indices.tolist(), strict=True)):
        for value, unit in zip(vs, us, strict=True):
            if value > 0:
                cell = cells.setdefault((languages[language[row]], unit), ([], set()))
                cell[0].append(value)
                cell[1].add(int(text[row]))
    return {key: (len(v), len(t), sum(v), max(v), min(v)) for key, (v, t) in cells.items()}


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 40), st.integers(1, 12))
def test_counts_equal_a_naive_loop_however_they_are_cut(seed, rows, size):
    g = torch.Generator().manual_seed(seed)
    languages, units, k = ["no", "en", "zh-CN"], 6, 2
    text = torch.randint(0, 8, (rows,), generator=g).sort().values
    language = text % 3
    values = torch.randn(rows, k, generator=g).relu()
    indices = torch.stack([torch.randperm(units, generator=g)[:k] for _ in range(rows)])
    counter = Counter(languages, units)
    cuts = whole_texts(text, size)
    assert [a for a, _ in cuts] == [0, *(b for _, b in cuts[:-1])] and cuts[-1][1] == rows
    for start, end in cuts:
        counter.add(values[start:end], indices[start:end], language[start:end], text[start:end])
    frame = counter.frame(7)
    assert frame["layer"].unique().to_list() in ([7], [])
    found = {(r["language"], r["unit"]): r for r in frame.iter_rows(named=True)}
    expected = naive_counts(values, indices, language, text, languages)
    assert found.keys() == expected.keys()
    for key, (firings, texts, total, largest, smallest) in expected.items():
        row = found[key]
        assert (row["tokens"], row["texts"]) == (firings, texts)
        assert row["sum"] == pytest.approx(total) and row["max"] == largest and row["min_positive"] == smallest


def test_no_text_gives_no_rows():
    assert whole_texts(torch.tensor([], dtype=torch.int64), 4) == []
    assert Counter(["en"], 3).frame(0).is_empty()


def test_a_running_pass_counts_what_a_loop_over_the_texts_counts(model):
    draw = torch.Generator().manual_seed(4)
    decoder = torch.nn.functional.normalize(torch.randn(32, 16, generator=draw))
    sae = SAE(decoder, decoder, torch.zeros(32), torch.zeros(16), 3)
    frame = pl.DataFrame(
        {
            "text_id": [f"t{i}" for i in range(8)],
            "language": ["en", "tr"] * 4,
            "split": ["train"] * 7 + ["eval"],
            "token_ids": [list(range(2, 4 + i)) for i in range(8)],
        }
    )
    texts = tokens.TokenizedTexts(frame, [1])
    counts, totals, _ = count.count(model, texts, {"layers.1.mlp": sae}, ["en", "tr"], batch_tokens=16)["layers.1.mlp"]
    fired = {}
    for text, language in zip(texts[range(7)], frame["language"], strict=False):
        seen = hookpoints.read(model, ["layers.1.mlp"], input_ids=torch.tensor([text.ids]))["layers.1.mlp"][0, 1:]
        values, indices = sae.encode(seen)
        for unit in indices[values > 0].tolist():
            fired[language, unit] = fired.get((language, unit), 0) + 1
    assert {(row["language"], row["unit"]): row["tokens"] for row in counts.iter_rows(named=True)} == fired
    assert totals.rows() == [("en", 2 + 4 + 6 + 8, 4), ("tr", 3 + 5 + 7, 3)]
