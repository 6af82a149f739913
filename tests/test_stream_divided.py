"""Stage `stream` on two processes that train different SAEs: the bytes of one process, and one failure ends both."""

import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest
import stand_ins
import torch
import warm
from closure import ROOT
from pipeline import changed
from slurm import two_nodes

from babelscope import config
from babelscope.activations import streaming
from babelscope.config.schema import Hardware
from babelscope.core.errors import UserError
from babelscope.models import hardware
from babelscope.sae.training import loop

# Three for two processes: the first trains two SAEs. The blocks are small, so that many passes are divided.
HOOKPOINTS = ["layers.0.mlp", "layers.1", "layers.2.mlp"]
SCRIPT = """
import os, sys
from babelscope import config
from babelscope.activations import streaming
from babelscope.core import errors, paths, stage
from babelscope.features.run_stream import run
from babelscope.models import forward, processes
from babelscope.sae.training import learner, loop, parts

save, seen = parts.AtomicCheckpointIO.save_checkpoint, []

def end_second(self, checkpoint, path, storage_options=None):
    seen.append(path)
    if len(seen) == 2:  # one process has written its part of a checkpoint that never becomes complete
        if processes.rank() or self.parts == 1:
            parts.together = lambda work, device: (work(), os._exit(3))
            if self.parts == 1:
                os._exit(3)
    save(self, checkpoint, path, storage_options)

def fail(*arguments, **options):
    if processes.rank() == 1:
        raise errors.UserError("this batch is bad")
    return was(*arguments, **options)

def main():
    global was
    streaming._ROWS = streaming._BATCHES = 1
    loop._APART = 0
    match os.environ["MODE"]:
        case "kill":
            parts.AtomicCheckpointIO.save_checkpoint = end_second
        case "pass":
            was, forward.content_activations = forward.content_activations, fail
        case "step":
            was, learner.Learner.after_update = learner.Learner.after_update, fail
    run(config.load(), paths.Paths())

if __name__ == "__main__":
    stage.run(main)
"""


def prepare(folder: Path, **changes: Any) -> Path:
    """A folder with the texts and params of a small run."""
    rows = [
        {"text_id": f"{language}{number:03d}", "language": language, "split": "eval" if number % 5 == 0 else "train",
         "group": f"{language}{number}", "source": "toy", "text": stand_ins.text(language, number)}
        for language in ("en", "de") for number in range(60)
    ]  # fmt: skip
    (folder / "data/corpus").mkdir(parents=True)
    pl.DataFrame(rows).write_parquet(folder / "data/corpus/texts.parquet")
    model = stand_ins.model(folder / "model", "llama", 3)
    content = changed(config.read_yaml(ROOT / "params.yaml"), {
        "languages": ["en", "de"], "model.name": str(model), "model.source": "huggingface", "model.gguf_file": None,
        "model.sha256": None, "hookpoints": HOOKPOINTS, "corpus.max_tokens": 24, "extract.batch_tokens": 128,
        "train.source": "stream", "train.latents": 128, "train.k": 8, "train.tokens": 64 * 40, "train.batch": 64,
        "train.log_every": 5, "encode.chunk_tokens": 100, "stability.hookpoints": [], "steer.hookpoints": [],
        "neurons.hookpoints": [], "baselines.dictionaries": [], "hardware.accelerator": "cpu",
        "hardware.checkpoint_seconds": 0, "hardware.threads": 1, **changes,
    })  # fmt: skip
    (folder / "params.yaml").write_text(json.dumps(content))
    (folder / "stream.py").write_text(SCRIPT)
    return folder


def start(folder: Path, devices: int, mode: str = "", nodes: int = 1, **variables: str) -> warm.Process:
    content = config.read_yaml(folder / "params.yaml")
    content["hardware"] |= {"devices": devices, "num_nodes": nodes}
    (folder / "params.yaml").write_text(json.dumps(content))
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "MASTER_"))}
    kept |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(streaming.__file__).parents[2])}
    variables["MODE"] = mode
    said = folder / f"said-{variables.get('SLURM_PROCID', 0)}.txt"
    said.write_text("")
    return warm.Process([str(folder / "stream.py")], folder, kept | variables, said)


def finish(process: warm.Process, code: Sequence[int] = (0,)) -> str:
    process.wait(timeout=600)
    error = process.out.read_text()
    assert process.returncode in code, error[-5000:]
    return error


def files(folder: Path) -> dict[str, bytes]:
    out = folder / "data/stream"
    found = {path.relative_to(out).as_posix(): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
    assert len(found) == 1 + 6 * len(HOOKPOINTS) and not list((folder / ".scratch").glob("*.*"))
    return found


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one process."""
    folder = prepare(tmp_path_factory.mktemp("run") / "one")
    finish(start(folder, 1))
    return folder


@pytest.mark.parametrize(
    ("strategy", "devices", "nodes", "processes"),
    [("auto", 2, 1, 2), ("auto", 1, 3, 3), ("auto", 2, 2, 1), ("auto", 1, 1, 1), ("ddp", 2, 1, 1), ("fsdp", 2, 1, 1)],
)
def test_devices_train_different_saes_if_there_are_enough(
    strategy: str, devices: int, nodes: int, processes: int
) -> None:
    content = config.read_yaml(ROOT / "params.yaml")["hardware"]
    content |= {"strategy": strategy, "devices": devices, "num_nodes": nodes, "accelerator": "cpu"}
    assert hardware.divides(Hardware(**content), len(HOOKPOINTS)) == processes


def copy(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target))


def test_two_nodes_of_slurm_write_the_bytes_of_one(tmp_path: Path, one: Path) -> None:
    folder = copy(one, tmp_path / "two")
    processes = [start(folder, 1, nodes=2, **job) for job in two_nodes()]
    logs = [finish(process) for process in processes]
    assert files(folder) == files(one)
    assert [len(re.findall(r"^layers\.", log, re.MULTILINE)) for log in logs] == [3, 0]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_devices_that_train_the_same_saes_end_with_them(tmp_path: Path, one: Path, strategy: str) -> None:
    folder = prepare(tmp_path / "two", **{"hardware.strategy": strategy})
    finish(start(folder, 2))
    assert files(folder).keys() == files(one).keys()


def test_a_killed_run_resumes_on_any_number_of_devices(tmp_path: Path) -> None:
    changes = {"train.activation": "jumprelu", "train.transcode": True, "ablate.methods": ["directional"]}
    whole = prepare(tmp_path / "whole", **changes)
    first, second = copy(whole, tmp_path / "one"), copy(whole, tmp_path / "two")
    finish(start(whole, 1))
    finish(start(second, 2, "kill"), (1, -9))
    [path] = (second / ".scratch").rglob("last.ckpt")
    state = torch.load(path, weights_only=True)
    assert (state["parts"], state["global_step"]) == (2, 5) and list(state["histories"]) == [0, 2]
    assert {part.name for part in path.parent.glob("last-*")} == {"last-5-1.ckpt", "last-10-1.ckpt"}
    stub = SimpleNamespace(CHECKPOINT_HYPER_PARAMS_KEY="hyper_parameters", hparams=state["hyper_parameters"], steps=40)
    with pytest.raises(UserError, match="which fsdp cannot read; set it to auto, or delete the file"):
        loop.resumable(path, stub, "fsdp")  # type: ignore[arg-type]
    finish(start(first, 1, "kill"), (3,))
    third = copy(second, tmp_path / "three")
    for folder, devices in ((second, 2), (third, 1), (first, 2)):
        log = finish(start(folder, devices))
        assert f"resumed at step {1 if folder == first else 5} of 40" in log
        assert files(folder) == files(whole)


@pytest.mark.parametrize("mode", ["pass", "step"])
def test_a_failure_of_one_process_ends_all_with_its_message(tmp_path: Path, one: Path, mode: str) -> None:
    folder = copy(one, tmp_path / "two")
    log = finish(start(folder, 2, mode), (1, -9))
    assert "error: this batch is bad" in log
    if mode == "pass":
        assert "error: process 1 of 2 has failed: this batch is bad" in log
    assert not (folder / "data/stream/mode.json").exists()
