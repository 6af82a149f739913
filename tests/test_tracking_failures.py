"""A tracking server that hangs or dies, a database that is locked or none: training goes on, runs are mended."""

import contextlib
import shutil
import socket
import sqlite3
import sys
import threading
import time
from pathlib import Path

import pytest
from test_cluster import ROOT, free_port, serving

from babelscope import config
from babelscope.core.fingerprint import dvc_md5
from babelscope.core.paths import Paths
from babelscope.tracking import state, store, sync, training

USED = {"seed": 0, "train": {"k": 4}}
STAGE, OUT = "train@layers.0", "data/sae/layers.0"


@pytest.fixture
def repo(tmp_path, monkeypatch):
    """An empty repository, and MLflow's client told to give up at once."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(training, "_EVERY", 0.1)
    monkeypatch.setattr(training, "_RETRY", 0.2)
    monkeypatch.setattr(training, "_LAST", 60.0)
    monkeypatch.chdir(tmp_path)
    history = tmp_path / OUT / "history.csv"
    history.parent.mkdir(parents=True)
    history.write_text("step,loss\n" + "".join(f"{step},{1 / step}\n" for step in range(1, 11)))
    return tmp_path


def train(pause=0.0, between=None, live_after=0.0, first=1):
    """What the stage does: ten steps, logged, and the end; `between` happens after half of them."""
    content = config.read_yaml(ROOT / "params.yaml") | {"track": {"experiment": "x", "live_after": live_after}}
    with training.TrainingRun(config.parse(content), stage=STAGE, fingerprint="f" * 32, used=USED) as run:
        for step in range(first, 11):
            run.log(step, {"loss": 1 / step})
            time.sleep(pause)
            if step == 5 and between is not None:
                between(run)
        run.finish(dvc_md5(Path(OUT)), [{"step": step, "loss": 1 / step} for step in range(1, 11)])


def mend():
    """What `track` does for a training."""
    opened = store.open_store("x")
    entry = state.Training(STAGE, store.flatten(USED), OUT, dvc_md5(Path(OUT)))
    sync._training(opened, Path(), entry)
    [run] = opened.search(dvc__stage=STAGE)
    assert run.info.status == "FINISHED"
    assert opened.points(run) == {("loss", step): pytest.approx(1 / step) for step in range(1, 11)}


@contextlib.contextmanager
def server(port, folder):
    """A real MLflow server while it answers."""
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/server.db"]
    with serving(command, port, "/health", folder / "log.txt", MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false"):
        yield


@pytest.fixture
def port():
    return free_port()


def test_a_server_that_dies_in_mid_run_and_comes_back(repo, port, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    first = contextlib.ExitStack()
    first.enter_context(server(port, repo))

    def die(run):
        while not run._known:  # MLflow's import takes its time on a busy machine
            time.sleep(0.1)
        first.close()

    train(pause=0.4, between=die)
    assert "training goes on" in caplog.text and "`dvc repro` completes it" in caplog.text
    with server(port, repo):
        [run] = store.open_store("x").search(dvc__stage=STAGE)
        assert run.info.status == "RUNNING" and run.data.metrics
        mend()


def test_a_server_that_never_answers_holds_nothing_up(repo, port, monkeypatch, caplog):
    with socket.create_server(("127.0.0.1", port)) as silent:
        connections = []

        def accept():
            with contextlib.suppress(OSError):
                while True:
                    connections.append(silent.accept())

        threading.Thread(target=accept, daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:hunter22@127.0.0.1:{port}")
        monkeypatch.setattr(training, "_LAST", 8.0)
        start = time.monotonic()
        train()
        assert time.monotonic() - start < 20 and connections
    assert "`dvc repro` completes it" in caplog.text
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    mend()


def test_a_short_training_leaves_its_run_to_track(repo, caplog):
    start = time.monotonic()
    train(live_after=60.0)
    assert time.monotonic() - start < 10 and not (repo / "mlflow.db").exists() and not caplog.text
    mend()


def test_a_training_is_live_after_a_while_with_what_it_logged_before(repo):
    def look(run):
        while len(run._known) < 5:
            time.sleep(0.1)
        [live] = store.open_store("x").search(dvc__stage=STAGE)
        assert live.info.run_name == "SAE layers.0 gemma-3-270m k=4"
        assert live.info.status == "RUNNING" and len(store.open_store("x").points(live)) == 5

    train(live_after=0.5, between=look)
    mend()


def test_a_training_that_was_killed_before_it_was_live_gets_all_points(repo):
    train(first=7)  # resumed at a checkpoint of step 6
    mend()


def test_an_empty_database_is_filled(repo):
    (repo / "mlflow.db").touch()
    train()
    mend()


def test_a_database_that_is_none_costs_a_warning(repo, caplog):
    (repo / "mlflow.db").write_bytes(b"no database, but long enough to be looked into as one" * 40)
    train()
    assert "training goes on" in caplog.text and "file is not a database" in caplog.text
    (repo / "dvc.yaml").write_text("stages: {}\n")
    (repo / "dvc.lock").write_text("stages: {}\n")
    caplog.clear()
    (repo / "params.yaml").write_text("track: {experiment: x}\n")
    sync.sync(Paths(repo))
    assert "track: cannot log to sqlite" in caplog.text


def test_a_database_that_another_process_has_locked(repo, caplog):
    store.open_store("x")
    holder = sqlite3.connect(repo / "mlflow.db", isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    train(between=lambda run: holder.execute("ROLLBACK"), pause=0.2)
    holder.close()
    mend()


def test_a_repository_whose_path_means_something_in_a_uri(repo, monkeypatch):
    """SQLAlchemy decodes `%20` and cuts at `?`; MLflow decodes paths of artifacts."""
    odd = repo / "a%20b?c#d%"
    odd.mkdir()
    (repo / "data").rename(odd / "data")
    monkeypatch.chdir(odd)
    monkeypatch.setenv("DVC_ROOT", str(odd))
    train()
    mend()
    opened = store.open_store("x")
    [run] = opened.search(dvc__stage=STAGE)
    opened.client.log_text(run.info.run_id, "found", "note.txt")
    folder = store.local_folder(run.info.artifact_uri)
    assert (folder / "note.txt").read_text() == "found" and folder.is_relative_to(odd / "mlruns" / "x")
    assert store.local_folder(run.info.artifact_uri).is_dir()
    assert sorted(path.name for path in repo.iterdir()) == [odd.name]
    assert {"mlflow.db", "mlruns"} <= {path.name for path in odd.iterdir()}
    # Moved, its artifacts are found again.
    moved = odd.rename(repo / "moved")
    monkeypatch.chdir(moved)
    monkeypatch.setenv("DVC_ROOT", str(moved))
    [run] = store.open_store("x").search(dvc__stage=STAGE)
    assert (store.local_folder(run.info.artifact_uri) / "note.txt").read_text() == "found"


def test_what_is_in_mlflow_is_remembered_until_anything_is_written_to_it(repo, caplog):
    caplog.set_level("INFO")
    (repo / "params.yaml").write_text("train: {k: 4}\nmodel: {name: m}\nscore: {members: 1}\ntrack: {experiment: x}\n"
                                      "languages: [en]\nhookpoints: [layers.0]\n")  # fmt: skip
    (repo / "dvc.yaml").write_text("stages: {train: {matrix: {hookpoint: '${hookpoints}'}}}\n")
    out = f"{{path: {OUT}, hash: md5, md5: {dvc_md5(Path(OUT))}}}"
    (repo / "dvc.lock").write_text(f"stages:\n  {STAGE}: {{outs: [{out}]}}\n")
    (repo / "metrics").mkdir()

    def track():
        caplog.clear()
        sync.sync(Paths(repo))
        return caplog.text

    assert "logged, 1 training runs logged" in track()
    for _ in range(2):
        asked = track()
        assert "is in MLflow already" in asked and "training runs" not in asked  # MLflow was not asked
    opened = store.open_store("x")
    [run] = opened.search(babelscope__kind="training")
    opened.client.delete_run(run.info.run_id)
    assert "is in MLflow already, 1 training runs logged" in track()
    shutil.rmtree(repo / "mlruns/x")
    assert "logged, 0 training runs logged" in track()
    assert len(opened.search(babelscope__kind="training")) == len(opened.search(babelscope__kind="summary")) == 1
    (repo / "mlflow.db").unlink()
    assert store.stamp("x") == ""


def test_tables_that_are_not_as_expected_are_left_alone(repo, caplog):
    database = repo / "mlflow.db"
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("CREATE TABLE experiments (artifact_location TEXT)")
        connection.execute("CREATE TABLE runs (another TEXT)")
        connection.execute("INSERT INTO experiments VALUES ('/old/mlruns/x')")
    store._follow(database, "/old/mlruns/x", "x")
    assert "no column runs.artifact_uri" in caplog.text
    with contextlib.closing(sqlite3.connect(database)) as connection:
        assert connection.execute("SELECT * FROM experiments").fetchall() == [("/old/mlruns/x",)]
