"""Two trainings side by side: the bytes of one and two threads, which hookpoint is next, and what its stage finds."""

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from closure import ROOT
from test_browse_stage import WIDE, browse, folder  # noqa: F401
from test_neurons_stages import SAE_AT, model, set_params  # noqa: F401
from test_sae_training import SETTINGS, FakeStore, batches_of

from babelscope import config
from babelscope.core import stage
from babelscope.sae.training import ahead, loop
from babelscope.sae.training.loop import train

STAGE = str(ROOT / "stages/train.py")


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# The last are the sizes of experiments/smollm2-135m.yaml.
SIZES = [{}, {"activation": "batchtopk"}, {"matryoshka": [100, 400]}, {"latents": 4608, "k": 32}]


@pytest.mark.parametrize(("changes", "stretch"), [*((changes, 1) for changes in SIZES), ({}, 300)])
def test_one_and_two_threads_give_the_same_bytes(
    tmp_path: Path, threads: None, changes: dict[str, Any], stretch: int
) -> None:
    """At the default's sizes: a training gives the same whether or not another one takes a core of two."""
    sizes: dict[str, Any] = {"latents": 1152, "k": 8, "batch": 1024, "tokens": 1024 * 12, "dead_after": 2048}
    settings = SETTINGS.model_copy(update=sizes | {"log_every": 1, "weight_decay": 3.0} | changes)
    store, results = FakeStore(d=576 if settings.k == 32 else 640), []
    store.data[:, 0] *= stretch  # activations of one large direction are whitened
    assert (batches_of(store, settings).moments()[0][0].whitening() is not None) == (stretch > 1)
    for count in (1, 2):
        torch.set_num_threads(count)
        hardware = config.load(ROOT / "params.yaml").hardware.model_copy(update={"accelerator": "cpu"})
        found = train(batches_of(store, settings), settings, hardware, seed=1, folder=tmp_path)
        assert found is not None
        [(sae, history)] = found
        results.append(([w.detach().numpy().tobytes() for w in sae.parameters()], history))
    assert results[0][1][-1]["dead_share"] > 0  # the loss of dead latents takes part
    assert results[0] == results[1]


def test_the_number_of_threads_depends_on_the_machine_and_the_size_alone(threads: None) -> None:
    for every, alone, paired in ((1, 1, 1), (2, 2, 1), (3, 1, 1), (8, 4, 4)):
        torch.set_num_threads(every)
        for weights, expected in ((1152 * 640, {False: alone, True: paired}), (2**23, {False: every, True: every})):
            for company, count in expected.items():
                with ahead.shared_threads(weights, company) as given:
                    assert torch.get_num_threads() == given == count
                assert torch.get_num_threads() == every


def test_the_next_hookpoint_is_the_first_that_dvc_would_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    dvc = [sys.executable, "-m", "dvc"]
    subprocess.run([*dvc, "init", "--no-scm", "-q"], check=True)
    Path("dvc.yaml").write_text(
        "stages:\n  train:\n    matrix:\n      hookpoint: [a.b, c.d, e.f]\n    cmd: cat in > ${item.hookpoint}\n"
        "    deps: [in]\n    outs: ['${item.hookpoint}']\n"
    )
    Path("in").write_text("1")
    assert ahead._next("train", ["a.b"]) is None  # DVC does not run this
    monkeypatch.setenv("DVC_ROOT", ".")
    assert ahead._next("train", ["c.d", "e.f"]) == "c.d"
    subprocess.run([*dvc, "repro", "-q", "train@c.d"], check=True)
    assert ahead._next("train", ["c.d", "e.f"]) == "e.f"
    assert ahead._next("train", []) is None
    Path("in").write_text("2")
    assert ahead._next("train", ["c.d", "e.f"]) == "c.d"
    waiting = Path(".scratch/train@c.d.0123", ahead.FIGURES)
    waiting.parent.mkdir(parents=True)
    waiting.write_text("{}")
    assert ahead._next("train", ["c.d", "e.f"]) == "e.f"
    waiting.parent.rename(".scratch/train@c.d.more.0123")  # of another hookpoint
    assert ahead._next("train", ["c.d", "e.f"]) == "c.d"
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert ahead._next("train", ["e.f"]) is None


def outputs(hookpoint: str) -> list[bytes]:
    files = sorted(Path("data/sae", hookpoint).iterdir())
    assert [file.name for file in files] == ["cfg.json", "history.csv", "sae_weights.safetensors"]
    return [file.read_bytes() for file in [*files, Path(f"metrics/train.{hookpoint}.json")]]


def test_the_second_training_leaves_the_same_files_and_its_stage_takes_them(
    folder: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    threads: None,
) -> None:
    browse()
    content = json.loads(Path("params.yaml").read_text())
    content["train"] |= {"latents": 64, "k": 3, "tokens": 4096, "batch": 64, "matryoshka": None}
    Path("params.yaml").write_text(json.dumps(content))
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    torch.set_num_threads(2)

    def run(hookpoint: str) -> None:
        monkeypatch.setattr("sys.argv", [STAGE, hookpoint])
        stage.run(runpy.run_path(STAGE)["main"])

    def work() -> list[str]:
        return sorted(path.name.rpartition(".")[0] for path in Path(".scratch").glob("train@*"))

    run(WIDE)  # alone, for comparison
    alone = outputs(WIDE)
    assert not work()
    for file in Path("data/sae", WIDE).iterdir():
        file.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(ahead, "_next", lambda name, others: others[0])
        run(SAE_AT)
    assert outputs(SAE_AT) and work() == [f"train@{WIDE}"]
    assert not list(Path("data/sae", WIDE).iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train", None)  # nothing is trained
        run(WIDE)
    assert outputs(WIDE) == alone and not work()


def test_a_second_process_does_not_wait_for_the_stage_itself(
    folder: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.argv", [STAGE, WIDE])
    with stage.alone():
        environ = os.environ | {stage.AHEAD: "1", "PYTHONPATH": str(ROOT / "src")}
        done = subprocess.run([sys.executable, STAGE, WIDE], env=environ, timeout=60)
    assert done.returncode == 0
    assert not list(Path(".scratch").glob("train@*"))
