"""Two processes train the same SAE as one: the same global batches give the same loss curve."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_sae_training import FakeStore, HARDWARE, SETTINGS, batches_of, silent
from babelscope.sae.module import train

if __name__ == "__main__":
    devices, activation = int(sys.argv[1]), sys.argv[2]
    settings = SETTINGS.model_copy(update={{"activation": activation}})
    hardware = HARDWARE.model_copy(update={{"devices": devices, "strategy": "ddp" if devices > 1 else "auto"}})
    trained = train(
        batches_of(FakeStore(), settings), settings, hardware, seed=1, write=[silent], checkpoint=Path(sys.argv[3])
    )
    if trained is not None:
        [(sae, history)] = trained
        Path(sys.argv[4]).write_text(json.dumps([history, sae.W_dec.detach().flatten()[:500].tolist()]))
"""


@pytest.mark.parametrize("activation", ["topk", "jumprelu"])
def test_two_processes_have_the_loss_curve_of_one(tmp_path: Path, activation: str) -> None:
    script = tmp_path / "ddp.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent)))
    results = []
    for devices in (1, 2):
        out = tmp_path / f"{devices}.json"
        command = [sys.executable, str(script), str(devices), activation, str(tmp_path / f"{devices}.pt"), str(out)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        results.append(json.loads(out.read_text()))
    (one, weights), (two, others) = results
    assert [row["step"] for row in one] == [row["step"] for row in two]
    for name in ("loss", "fvu", "l0", "learning_rate"):
        assert [row[name] for row in two] == pytest.approx([row[name] for row in one], rel=2e-2), name
    assert [row["loss"] for row in two[:3]] == pytest.approx([row["loss"] for row in one[:3]], rel=1e-3)
    assert others == pytest.approx(weights, abs=0.05)
