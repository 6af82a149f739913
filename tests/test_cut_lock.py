"""A kill in the middle of DVC's writing of dvc.lock, which it does in place."""

import subprocess
import sys
from pathlib import Path

import pytest
from test_tracking import HOOKPOINTS, expected, toy

# DVC itself, that dies where it has written so much of the first dvc.lock which names a training.
DVC = """
import io, os, signal, sys
from dvc.utils.serialize import _yaml

until, whole = sys.argv.pop(1), _yaml._dump

def dump(data, stream):
    text = io.StringIO()
    whole(data, text)
    if "train@" in text.getvalue():
        stream.write(text.getvalue()[: text.getvalue().rindex(until)])
        stream.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    stream.write(text.getvalue())

_yaml._dump = dump
from dvc.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("until", "mend"), [("ze: ", "rm dvc.lock"), ("5: ", "git checkout dvc.lock"), ("  train@", "")]
)
def test_a_lock_file_that_was_cut_costs_no_result(tmp_path: Path, until: str, mend: str) -> None:
    repo = toy(tmp_path / "repo")
    repo.dvc("repro", "sample")
    repo.commit()
    options = {"cwd": repo.folder, "env": repo.environment(), "capture_output": True, "text": True}
    killed = subprocess.run([sys.executable, "-c", DVC, until, "repro"], **options)
    assert killed.returncode == -9 and f"Running stage 'train@{HOOKPOINTS[0]}'" in killed.stdout
    if mend:
        assert "dvc.lock' is invalid" in repo.dvc("repro", fails=True)
        subprocess.run(mend.split(), check=True, **options)
    # Else what was written is YAML by chance, and only lacks its end.
    output = repo.dvc("repro")
    for name in ("sample", f"train@{HOOKPOINTS[0]}"):
        assert f"Running stage '{name}'" not in output
    assert repo.names() == expected(4)
