"""The toy pipeline on a cluster's parts: SLURM's array jobs side by side, an MLflow server, a DVC remote in S3."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from test_tracking import HOOKPOINTS, ROOT, STEPS, YAML_, Repo, toy

SLURM = ROOT / "docs/slurm"
S3 = ROOT / ".bench/s3/bin"


@contextmanager
def serving(command: list[str], port: int, health: str, log: Path, **environment: str) -> Iterator[str]:
    """A server while it answers; yields its address."""
    address = f"http://127.0.0.1:{port}"
    with log.open("w") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, env=os.environ | environment, start_new_session=True
        )
        try:
            deadline = time.monotonic() + 120
            while True:
                try:
                    urllib.request.urlopen(address + health, timeout=5).close()
                    break
                except OSError:
                    assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
                    time.sleep(0.2)
            yield address
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait(30)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture(scope="module")
def mlflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A tracking server with a database of its own, that passes on the artifacts."""
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
               "--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", str(folder / "kept"),
               "--serve-artifacts"]  # fmt: skip
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with serving(command, port, "/health", folder / "log.txt", **quiet) as address:
        yield address


def ask(address: str, path: str, **content: Any) -> Any:
    request = urllib.request.Request(
        f"{address}/api/2.0/mlflow/{path}", json.dumps(content).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def runs(address: str, kind: str) -> list[dict[str, Any]]:
    """The runs of one kind: `id`, `status`, `place` (of the artifacts), tags, params and the last metrics."""
    with urllib.request.urlopen(f"{address}/api/2.0/mlflow/experiments/get-by-name?experiment_name=toy") as answer:
        experiment = json.load(answer)["experiment"]["experiment_id"]
    found = ask(address, "runs/search", experiment_ids=[experiment], filter=f"tags.`babelscope.kind` = '{kind}'")
    flat = []
    for run in found.get("runs", []):
        parts = {
            part: {e["key"]: e["value"] for e in run["data"].get(part, [])} for part in ("tags", "params", "metrics")
        }
        info = run["info"]
        flat.append({"id": info["run_id"], "status": info["status"], "place": info["artifact_uri"], **parts})
    return flat


def series(address: str, run: dict[str, Any], key: str) -> list[int]:
    query = f"{address}/api/2.0/mlflow/metrics/get-history?run_id={run['id']}&metric_key={key}"
    with urllib.request.urlopen(query, timeout=60) as answer:
        return [int(point["step"]) for point in json.load(answer).get("metrics", [])]


def side_by_side(repo: Repo, *stages: str, **environment: str) -> None:
    """Run docs/slurm/hookpoints.sbatch as an array of jobs, all at once."""
    jobs = [
        subprocess.Popen(
            ["bash", str(SLURM / "hookpoints.sbatch"), *stages], cwd=repo.folder, text=True,
            env=repo.environment(SLURM_SUBMIT_DIR=str(repo.folder), SLURM_ARRAY_TASK_ID=str(number), **environment),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for number in range(len(HOOKPOINTS))
    ]  # fmt: skip
    outputs = [job.communicate(timeout=300)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0] * len(jobs), outputs


@pytest.mark.parametrize("script", sorted(SLURM.glob("*.sbatch")), ids=lambda path: path.name)
def test_the_slurm_scripts_are_whole_and_ask_for_what_they_need(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    lines = script.read_text().splitlines()
    options = [line for line in lines if line.startswith("#SBATCH ")]
    assert lines[0] == "#!/bin/bash" and "set -euo pipefail" in lines
    # SLURM reads no option behind the first command.
    assert options and max(map(lines.index, options)) < lines.index("set -euo pipefail")
    assert {"--job-name", "--nodes", "--time"} <= {re.split("[ =]", option)[1] for option in options}
    alone = subprocess.run(["bash", str(script)], capture_output=True, text=True, env={"PATH": os.environ["PATH"]})
    assert alone.returncode != 0 and "start it by sbatch" in alone.stderr


def test_array_jobs_side_by_side_and_a_server(tmp_path: Path, mlflow: str) -> None:
    repo, server = toy(tmp_path / "repo"), {"MLFLOW_TRACKING_URI": mlflow}
    repo.dvc("repro", "sample")
    side_by_side(repo, "train", **server)
    locked = YAML_.load((repo.folder / "dvc.lock").read_text())["stages"]
    assert {f"train@{name}" for name in HOOKPOINTS} < set(locked)
    output = repo.dvc("repro", **server)
    assert "Running stage 'score'" in output and "Running stage 'train@" not in output
    assert "logged, 0 training runs logged" in output
    trainings = runs(mlflow, "training")
    assert {run["tags"]["dvc.stage"] for run in trainings} == {f"train@{name}" for name in HOOKPOINTS}
    assert all(run["status"] == "FINISHED" and series(mlflow, run, "loss") == list(STEPS) for run in trainings)

    [summary] = runs(mlflow, "summary")
    place = re.fullmatch(r"mlflow-artifacts:(?://[^/]*)?/?(.*)", summary["place"])
    assert place and not (repo.folder / "mlruns").exists() and not (repo.folder / "mlflow.db").exists()
    with urllib.request.urlopen(f"{mlflow}/api/2.0/mlflow-artifacts/artifacts/{place[1]}/report.html") as page:
        assert page.read() == (repo.folder / "reports/report.html").read_bytes()

    # A killed training is found again by its fingerprint; one without a server is logged when there is one.
    repo.set("hookpoints", HOOKPOINTS[:1])
    repo.set("train", "k", 8)
    repo.dvc("repro", "-s", f"train@{HOOKPOINTS[0]}", fails=True, TOY_DIE=HOOKPOINTS[0], **server)
    [killed] = [run for run in runs(mlflow, "training") if run["status"] == "RUNNING"]
    repo.dvc("repro", "-s", f"train@{HOOKPOINTS[0]}", **server)
    [resumed] = [run for run in runs(mlflow, "training") if run["params"]["train.k"] == "8"]
    assert (resumed["id"], resumed["status"]) == (killed["id"], "FINISHED")
    assert series(mlflow, resumed, "loss") == list(STEPS)
    repo.set("train", "k", 16)
    down = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    assert "training goes on" in repo.dvc("repro", "-s", f"train@{HOOKPOINTS[0]}", **down)
    repo.dvc("repro", **server)
    [late] = [run for run in runs(mlflow, "training") if run["params"]["train.k"] == "16"]
    assert late["tags"]["babelscope.backfilled"] == "true" and series(mlflow, late, "loss") == list(STEPS)
    assert len(runs(mlflow, "summary")) == 2
    assert "is in MLflow already" in repo.dvc("repro", **server)


@pytest.mark.skipif(not (S3 / "dvc").is_file(), reason="make .bench/s3/.ready")
def test_a_remote_in_s3_gives_the_bytes_back(tmp_path: Path) -> None:
    repo, port = toy(tmp_path / "repo"), free_port()
    keys = {"AWS_ACCESS_KEY_ID": "toy", "AWS_SECRET_ACCESS_KEY": "toy", "AWS_DEFAULT_REGION": "us-east-1"}
    repo.dvc("repro", "sample")
    outs = {path: path.read_bytes() for path in (repo.folder / "data").rglob("*.parquet")}
    assert outs
    command = [str(S3 / "moto_server"), "-H", "127.0.0.1", "-p", str(port)]
    with serving(command, port, "/moto-api/", tmp_path / "moto.log") as address:
        bucket = urllib.request.Request(f"{address}/babelscope", method="PUT")
        urllib.request.urlopen(bucket, timeout=60).close()
        repo.dvc("remote", "add", "-d", "lab", "s3://babelscope/cache")
        repo.dvc("remote", "modify", "lab", "endpointurl", address)
        repo.run(str(S3 / "dvc"), "push", "sample", **keys)
        for folder in ("data", ".dvc/cache"):
            repo.run("rm", "-rf", folder)
        repo.run(str(S3 / "dvc"), "pull", "sample", **keys)
    assert {path: path.read_bytes() for path in outs} == outs
    assert "didn't change" in repo.dvc("repro", "sample")
