"""Damaged files, a disk that is full, activations that are none: one message that names the file or the key."""

import os
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
import test_sae_training as training
import torch
import transformers
from closure import ROOT
from safetensors.torch import save_file

from babelscope.activations.store import ActivationStore, write_index, write_shard
from babelscope.core import files, resume
from babelscope.core.errors import UserError
from babelscope.models import forward
from babelscope.models.tokens import TokenizedText
from babelscope.sae.metrics import quality
from babelscope.sae.training.loop import train

TABLE = pl.DataFrame({"language": ["en", "de"] * 500, "tokens": range(1000)})
DAMAGES = {
    "half": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "noise": lambda content: bytes(range(200)),
    "start": lambda content: b"XXXXXXXX" + content[8:],
    "end": lambda content: content[:-8] + b"XXXXXXXX",
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("read", [files.read_table, files.scan_table])
def test_a_damaged_table_is_named(tmp_path, damage, read):
    path = tmp_path / "tokens.parquet"
    TABLE.write_parquet(path)
    assert read(path).lazy().collect().equals(TABLE)
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    with pytest.raises(UserError, match=r"tokens.parquet: damaged or not readable \(.*; remove it, then run `dvc"):
        read(path)


def test_numbers_that_polars_would_believe_do_not_end_the_process(tmp_path):
    """Where 18, in Parquet's zigzag code, counts values or bytes, -19: Polars asks for 2 EiB and aborts."""
    path = tmp_path / "tokens.parquet"
    TABLE.head(18).write_parquet(path)
    content = path.read_bytes()
    places = [place for place, byte in enumerate(content) if byte == 36]
    refused = 0
    for place in places:
        path.write_bytes(content[:place] + bytes([37]) + content[place + 1 :])
        try:
            files.read_table(path)
        except UserError as error:
            assert "tokens.parquet: damaged" in str(error)
            refused += 1
    assert refused > len(places) / 2 > 2


def test_a_table_that_is_missing_or_lacks_a_column_is_named(tmp_path):
    with pytest.raises(UserError, match="x.parquet: no such file; an earlier stage writes it: dvc repro"):
        files.read_table(tmp_path / "x.parquet")
    TABLE.write_parquet(tmp_path / "x.parquet")
    with pytest.raises(UserError, match="x.parquet: damaged or not readable .*texts"):
        files.read_table(tmp_path / "x.parquet", columns=["texts"])


@pytest.mark.parametrize(
    ("content", "message"),
    [(b'{"a": ', "not valid JSON"), (b"\xff\xfe", "not valid JSON"), (b"[1]", "expected a JSON object, got list")],
)
def test_damaged_json_is_named(tmp_path, content, message):
    (tmp_path / "score.json").write_bytes(content)
    with pytest.raises(UserError, match=f"score.json: {message}"):
        files.read_json(tmp_path / "score.json")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_is_named(tmp_path, damage):
    write_shard(tmp_path, 0, torch.randn(50, 8).half())
    write_index(tmp_path, [50], 8, "float16", "m", "h")
    shard = next(tmp_path.glob("*.safetensors"))
    content = shard.read_bytes()
    shard.write_bytes(DAMAGES[damage](content))
    if damage == "end":  # the numbers themselves: only a hash can tell, `make verify`
        assert ActivationStore(tmp_path).rows == 50
        return
    with pytest.raises(UserError, match=rf"{shard.name}: "):
        ActivationStore(tmp_path)


@pytest.mark.parametrize("damage", ["half", "empty", "noise", "start"])
def test_a_damaged_part_of_an_interrupted_run_is_computed_again(tmp_path, damage, caplog):
    path = tmp_path / "part-000000.safetensors"
    assert resume.read_part(path) is None and not caplog.text
    save_file({"a": torch.arange(100)}, path)
    assert torch.equal(resume.read_part(path)["a"], torch.arange(100))
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    assert resume.read_part(path) is None
    assert "part-000000.safetensors: damaged, computed again" in caplog.text


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 64 KiB: a tmpfs, where one may be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)], check=False)
    if mounted.returncode:
        pytest.skip("mounting a tmpfs takes root on Linux")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


WRITERS = {
    "parquet": lambda path: pl.DataFrame({"a": os.urandom(200_000).hex()}).write_parquet(path),
    "csv": lambda path: pl.DataFrame({"a": range(100_000)}).write_csv(path),
    "safetensors": lambda path: save_file({"a": torch.zeros(100_000)}, path),
    "checkpoint": lambda path: torch.save(torch.zeros(100_000), path),
    "text": lambda path: path.write_text("x" * 200_000),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_told_and_leaves_the_old_file(small_disk, writer):
    (small_disk / "out").write_text("old")
    with pytest.raises(UserError, match="disk/out: (no space left on the disk|it could not be written .*disk full)"):
        files.write_atomically(small_disk / "out", WRITERS[writer])
    assert [path.name for path in small_disk.iterdir()] == ["out"]
    assert (small_disk / "out").read_text() == "old"


def test_a_read_only_disk_is_told(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for path in (small_disk / "out", small_disk / "new" / "out"):
        with pytest.raises(UserError, match="out: the file system is read-only"):
            files.write_json(path, {})


@pytest.mark.parametrize(
    ("error", "told"),
    [
        ("OSError(28, 'No space left on device', 'data/x')", "error: data/x: No space left on device; correct this"),
        ("MemoryError()", "error: out of memory ()"),
        ("RuntimeError('CUDA out of memory. Tried to allocate 2 GiB')", "error: out of memory (CUDA out of memory."),
        ('RuntimeError("DefaultCPUAllocator: can\'t allocate memory")', "error: out of memory (DefaultCPU"),
        ("pl.exceptions.PanicException('unwrap')", "error: a Parquet file below data/ is damaged (unwrap)"),
        ("pl.exceptions.ComputeError('parquet: bad')", "error: a Parquet file below data/ is damaged (bad)"),
        ("pl.exceptions.ComputeError('a bug')", "Traceback"),
        ("type('PanicException', (BaseException,), {})('of tokenizers')", "Traceback"),
        ("KeyError('a bug')", "Traceback"),
    ],
)
def test_a_stage_tells_what_the_machine_lacks_without_a_traceback(tmp_path, error, told):
    program = f"import polars as pl\nfrom babelscope.core import stage\ndef main():\n    raise {error}\nstage.run(main)"
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith(told)
    assert ("Traceback" in done.stderr) == (told == "Traceback")


def tiny_model(dtype=torch.float32):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval().requires_grad_(False).to(dtype)


BATCH = forward.collate([TokenizedText("a", (1, 2, 3, 4), 1), TokenizedText("b", (5, 6, 7), 1)])


def test_weights_that_are_no_numbers_are_told_by_their_hookpoint():
    model = tiny_model()
    model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    assert forward.content_activations(model, ["layers.0.mlp"], BATCH, torch.float16)["layers.0.mlp"].isfinite().all()
    with pytest.raises(
        UserError, match=r"extract.dtype: the model's activations at layers.1.mlp are infinite or not a"
    ):
        forward.content_activations(model, ["layers.0.mlp", "layers.1.mlp"], BATCH, torch.float16)


def test_activations_that_float16_cannot_hold_are_told_by_their_hookpoint():
    model = tiny_model()
    model.model.layers[1].mlp.down_proj.weight.mul_(1e12)
    forward.content_activations(model, ["layers.1.mlp"], BATCH, torch.bfloat16)
    with pytest.raises(UserError, match=r"extract.store_dtype: activations at layers.1.mlp do not fit in it"):
        forward.content_activations(model, ["layers.1.mlp"], BATCH, torch.float16)


class Same(training.FakeStore):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.data = torch.full_like(self.data, value)


@pytest.mark.parametrize("value", [0.0, 0.1, -300.0])
def test_a_hookpoint_that_always_says_the_same_is_refused(tmp_path: Path, value: float):
    batches, settings = training.batches_of(Same(value)), training.SETTINGS
    with pytest.raises(UserError, match="hookpoints: a hookpoint gives the same activations for all tokens"):
        train(batches, settings, training.HARDWARE, seed=1, folder=tmp_path)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_stored_activations_that_are_no_numbers_are_refused_before_training(tmp_path: Path, value: float):
    store = training.FakeStore()
    store.index = {"model": "m", "hookpoint": "layers.3.mlp"}
    store.data[1234, 5] = value
    with pytest.raises(UserError, match="data/activations: layers.3.mlp has infinite or NaN activations"):
        train(training.batches_of(store), training.SETTINGS, training.HARDWARE, seed=1, folder=tmp_path)


def test_a_training_that_diverges_leaves_no_sae(tmp_path: Path):
    settings = training.SETTINGS.model_copy(update={"learning_rate": 1e38})
    with pytest.raises(UserError, match="train.learning_rate: the training diverged; lower it"):
        training.run(tmp_path, settings)
    assert not (tmp_path / "sae_weights.safetensors").exists()


def test_held_out_activations_that_are_all_the_same_have_no_share_of_variance(tmp_path: Path):
    *_, sae = training.run(tmp_path)
    rows, code = torch.arange(2500, 3000), torch.zeros(500, dtype=torch.int64)
    with pytest.raises(UserError, match="corpus.eval_tokens: all held-out tokens have the same activations"):
        quality(sae, Same(2.0), rows, code, 1).figures(["en"])
    store = training.FakeStore()
    store.data[2500:2600] = 2.0
    code[100:] = 1
    figures = quality(sae, store, rows, code, 2).figures(["same", "en"])
    assert "fvu/same" not in figures and figures["fvu/en"] < 1


def test_fewer_rows_than_a_batch_are_passed_over_again(tmp_path: Path):
    settings = training.SETTINGS.model_copy(update={"tokens": 640})
    batches = training.Batches(training.FakeStore(), torch.arange(10), 64, 10, seed=3)
    [(sae, history)] = train(batches, settings, training.HARDWARE, seed=1, folder=tmp_path)
    assert history[-1]["step"] == 10 and all(weight.isfinite().all() for weight in sae.parameters())
