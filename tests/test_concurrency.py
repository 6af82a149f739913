"""Several processes at once: stages side by side, the same stage twice, experiments from the queue, one database."""

import errno
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ruamel.yaml import YAML
from test_tracking import HOOKPOINTS, ROOT, Repo, expected, toy

from babelscope.core import stage

TOY = str(ROOT / "tests" / "toy_pipeline.py")


@pytest.fixture
def repo(tmp_path: Path) -> Repo:
    return toy(tmp_path / "repo")


def start(repo: Repo, *command: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *command], cwd=repo.folder, env=repo.environment(**environment), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def outputs(repo: Repo) -> dict[str, str]:
    """What dvc.lock says that the trainings wrote."""
    stages = YAML(typ="safe").load((repo.folder / "dvc.lock").read_text())["stages"]
    found = {out["path"]: out["md5"] for name in HOOKPOINTS for out in stages[f"train@{name}"]["outs"]}
    assert len(found) >= len(HOOKPOINTS)
    return found


def holder(repo: Repo) -> int:
    """The process that is at the first training, once it is."""
    lock = repo.folder / ".scratch" / "locks" / f"toy_pipeline@train@{HOOKPOINTS[0]}.pid"
    deadline = time.monotonic() + 60
    while not (lock.is_file() and lock.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return int(lock.read_text())


def ends(*processes: subprocess.Popen[str]) -> list[tuple[int, str]]:
    texts = [process.communicate(timeout=120)[0] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, texts, strict=True)]


def test_two_stages_and_a_track_write_to_one_database_at_once(repo: Repo) -> None:
    repo.dvc("repro", "sample")
    trainings = [start(repo, "-m", "dvc", "repro", "-s", f"train@{name}", TOY_SECONDS="4") for name in HOOKPOINTS]
    time.sleep(1)
    tracks = [start(repo, str(ROOT / "stages" / "track.py")) for _ in range(2)]
    for code, text in ends(*trainings, *tracks):
        assert code == 0 and "locked" not in text and "cannot log" not in text, text
    output = repo.dvc("repro")
    assert "Running stage 'train@" not in output and "0 training runs logged" in output
    # The state before the trainings was tracked, too, once.
    assert repo.names() == expected(4) | {"summary 4": 2}
    side_by_side = outputs(repo)
    for name in HOOKPOINTS:
        repo.dvc("repro", "-f", "-s", f"train@{name}")
    assert outputs(repo) == side_by_side


def test_the_same_stage_twice_by_dvc_is_refused_by_its_lock(repo: Repo) -> None:
    repo.dvc("repro", "sample")
    first = start(repo, "-m", "dvc", "repro", "-s", f"train@{HOOKPOINTS[0]}", TOY_SECONDS="8")
    holder(repo)
    second = start(repo, "-m", "dvc", "repro", "-s", f"train@{HOOKPOINTS[0]}")
    (code, text), (refused, told) = ends(first, second)
    assert code == 0, text
    assert refused != 0 and "is busy, it is being blocked by" in told, told
    repo.dvc("repro")
    assert repo.names() == expected(4)


def test_the_same_stage_twice_by_hand_waits_for_its_turn(repo: Repo) -> None:
    repo.dvc("repro", "sample")
    first = start(repo, TOY, "train", HOOKPOINTS[0], TOY_SECONDS="3")
    assert holder(repo) == first.pid
    second = start(repo, TOY, "train", HOOKPOINTS[0])
    (code, text), (again, told) = ends(first, second)
    assert code == again == 0, text + told
    assert f"toy_pipeline@train@{HOOKPOINTS[0]}: waiting for process {first.pid}, which is still at this work" in told
    [run] = repo.runs()
    assert run.status == "FINISHED"


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux'")
def test_a_stage_does_not_outlive_its_dvc(repo: Repo) -> None:
    repo.dvc("repro", "sample")
    # Without the `exec` in dvc.yaml, other shells than bash may stay between DVC and its stage.
    dvc = start(repo, "-m", "dvc", "repro", "-s", f"train@{HOOKPOINTS[0]}", TOY_SECONDS="100", SHELL="/bin/sh")
    stage = holder(repo)
    assert Path(f"/proc/{stage}").exists()
    dvc.kill()
    dvc.wait()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{stage}").exists() and "Z" not in Path(f"/proc/{stage}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline, "the stage goes on without DVC"
        time.sleep(0.1)
    repo.dvc("repro")
    assert repo.names() == expected(4)


def test_two_experiments_from_the_queue_at_once(repo: Repo) -> None:
    repo.dvc("repro")
    repo.commit()
    for k in (8, 16):
        repo.dvc("exp", "run", "--queue", "--name", f"k-{k}", "-S", f"train.k={k}")
    repo.dvc("queue", "start", "-j", "2", TOY_SECONDS="2")
    deadline = time.monotonic() + 100
    while (status := repo.dvc("queue", "status")).count("Success") < 2:
        assert time.monotonic() < deadline and "Failed" not in status, status
        time.sleep(1)
    repo.dvc("queue", "stop", "--kill")
    assert repo.names() == expected(4, 8, 16)
    repo.dvc("exp", "apply", "k-8")
    assert "Running stage 'train@" not in repo.dvc("repro")
    assert repo.names() == expected(4, 8, 16)


def test_where_the_file_system_has_no_locks_a_stage_runs_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setattr("fcntl.flock", refuse)
    with stage.alone():
        assert list((tmp_path / ".scratch" / "locks").iterdir())
