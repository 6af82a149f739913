"""Two processes train the same SAE as one, with whole weights (DDP) or with half of them each (FSDP)."""

import json
import os
import runpy
import sys
from pathlib import Path

import pytest
import torch
import warm

from babelscope.sae.training import learner

SCRIPT = f"""
import json, os, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_sae_training import FakeStore, HARDWARE, SETTINGS, batches_of
from babelscope.sae.training import sharding
from babelscope.sae.training.learner import Learner
from babelscope.sae.training.loop import train

rows = set()

def count_rows(self, result, share, after_update=Learner.after_update):
    rows.add(len(sharding.local(self.sae.encoder)))
    after_update(self, result, share)

def write(step, metrics):
    if step == stop:
        os._exit(3)

if __name__ == "__main__":
    Learner.after_update = count_rows
    folder, devices, activation, strategy = Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:5]
    stop, accelerator = int(sys.argv[5]), sys.argv[6]
    settings = SETTINGS.model_copy(update={{"activation": activation}})
    hardware = HARDWARE.model_copy(update={{"devices": devices, "strategy": strategy, "accelerator": accelerator}})
    trained = train(batches_of(FakeStore(), settings), settings, hardware, seed=1, write=write, folder=folder)
    if trained is not None:
        [(sae, history)] = trained
        out = [history, sae.W_dec.detach().flatten()[:500].tolist(), sorted(rows)]
        (folder / "out.json").write_text(json.dumps(out))
"""


def start(folder: Path, devices: int, activation: str, strategy: str, stop: int = 0, accelerator: str = "cpu") -> None:
    folder.mkdir(exist_ok=True)
    script = folder / "train.py"
    script.write_text(SCRIPT)
    arguments = [str(script), str(folder), str(devices), activation, strategy, str(stop), accelerator]
    if devices == 1 and not stop:  # in this process: a new one takes seconds to import torch and Lightning
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(learner.Learner, "after_update", learner.Learner.after_update)  # which the script replaces
            patch.setattr(sys, "path", list(sys.path))
            patch.setattr(sys, "argv", arguments)
            patch.chdir(folder)
            runpy.run_path(str(script), run_name="__main__")
        return
    source = Path(learner.__file__).parents[3]
    code, said = warm.run(folder, *arguments, env=os.environ | {"PYTHONPATH": str(source)})
    assert code == (3 if stop else 0), said[-3000:]


def result(folder: Path) -> tuple[list[dict[str, float]], list[float], list[int]]:
    history, weights, rows = json.loads((folder / "out.json").read_text())
    return history, weights, rows


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of what one process trained."""
    found = {}
    for activation in ("topk", "jumprelu"):
        found[activation] = tmp_path_factory.mktemp(activation)
        start(found[activation], 1, activation, "auto")
    return found


# The next test trains TopK with FSDP.
@pytest.mark.parametrize(("activation", "strategy"), [("topk", "ddp"), ("jumprelu", "ddp"), ("jumprelu", "fsdp")])
def test_two_processes_have_the_loss_curve_of_one(
    tmp_path: Path, one: dict[str, Path], activation: str, strategy: str
) -> None:
    start(tmp_path, 2, activation, strategy)
    alone, weights, [latents] = result(one[activation])
    two, others, kept = result(tmp_path)
    assert kept == [latents // 2 if strategy == "fsdp" else latents]
    assert [row["step"] for row in alone] == [row["step"] for row in two]
    for name in ("loss", "fvu", "l0", "learning_rate"):
        assert [row[name] for row in two] == pytest.approx([row[name] for row in alone], rel=2e-2), name
    assert [row["loss"] for row in two[:3]] == pytest.approx([row["loss"] for row in alone[:3]], rel=1e-3)
    assert others == pytest.approx(weights, abs=0.05)


def test_pieces_that_were_killed_go_on_from_their_checkpoint(tmp_path: Path, one: dict[str, Path]) -> None:
    alone, weights, [latents] = result(one["topk"])
    start(tmp_path, 2, "topk", "fsdp", stop=int(alone[len(alone) // 2]["step"]))
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert 0 < state["global_step"] < alone[-1]["step"]
    start(tmp_path, 2, "topk", "fsdp")
    two, others, kept = result(tmp_path)
    assert kept == [latents // 2]
    assert [row["step"] for row in two] == [row["step"] for row in alone]
    for name in ("loss", "fvu", "l0", "learning_rate"):
        assert [row[name] for row in two] == pytest.approx([row[name] for row in alone], rel=2e-2), name
    assert [row["loss"] for row in two[:3]] == pytest.approx([row["loss"] for row in alone[:3]], rel=1e-3)
    assert others == pytest.approx(weights, abs=0.05)
    # What pieces have written, one device reads, too.
    torch.save(state, tmp_path / "last.ckpt")
    start(tmp_path, 1, "topk", "auto")
    assert result(tmp_path)[1] == pytest.approx(weights, abs=0.05)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_one_gpu_computes_the_same_in_pieces(tmp_path: Path) -> None:
    start(tmp_path / "whole", 1, "topk", "auto", accelerator="gpu")
    start(tmp_path / "piece", 1, "topk", "fsdp", accelerator="gpu")
    (alone, weights, _), (piece, others, _) = (result(tmp_path / name) for name in ("whole", "piece"))
    assert [row["loss"] for row in piece] == pytest.approx([row["loss"] for row in alone], rel=1e-2)
    assert others == pytest.approx(weights, abs=0.02)
