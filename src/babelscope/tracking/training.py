"""Live MLflow runs of trainings, written by a thread of their own: tracking never holds up or stops a training."""

import json
import logging
import math
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from babelscope.core.redact import redact
from babelscope.tracking import store

log = logging.getLogger(__name__)

# Seconds between two writes, between two attempts to reach a dead server, and to wait for the last write.
_EVERY, _RETRY, _LAST = 2.0, 30.0, 60.0
_BATCH = 1000  # metrics in one call: MLflow's limit

Points = dict[tuple[str, int], float]


class TrainingRun:
    """The MLflow run of one training; the constructor returns at once (see `training_run`).

    A context manager: leaving it by an exception marks the run as failed, or as killed where the user stopped it.
    """

    def __init__(
        self,
        experiment: str,
        stage: str,
        fingerprint: str,
        name: str,
        params: Mapping[str, str],
        tags: Mapping[str, str],
    ) -> None:
        self._experiment, self._name, self._params = experiment, name, params
        self._keys = {"dvc.stage": stage, "babelscope.core.fingerprint": fingerprint}
        self._tags = {**tags, **self._keys, "babelscope.kind": "training"}
        self._store: store.Store | None = None
        self._run_id = ""
        self._known: Points = {}
        self._contradicted = False
        self._pending: list[tuple[str, float, int, int]] = []
        self._lock, self._wake = threading.Lock(), threading.Event()
        self._end: tuple[str, str] | None = None
        self._warned = self._done = False
        self._thread = threading.Thread(target=self._write, name="mlflow", daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take down the metrics of one step; they are written within seconds. What is not finite is left out."""
        now = int(time.time() * 1000)
        points = [(key, float(value), now, step) for key, value in metrics.items() if math.isfinite(value)]
        with self._lock:
            self._pending += points

    def finish(self, output_md5: str) -> None:
        """Write what is left and end the run. `output_md5`: what `dvc_md5` says of the training's output folder."""
        self._close("FINISHED", output_md5)

    def fail(self, status: str = "FAILED") -> None:
        """Write what is left and end the run as `FAILED` or `KILLED`; the next training like it resumes it."""
        self._close(status, "")

    def __enter__(self) -> "TrainingRun":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._end is None:
            self.fail("FAILED" if kind is None or issubclass(kind, Exception) else "KILLED")

    def _close(self, status: str, output_md5: str) -> None:
        self._end = (status, output_md5)
        self._wake.set()
        self._thread.join(_LAST)
        if not self._done:
            log.warning("mlflow: the run of %s is incomplete; `dvc repro` completes it", self._keys["dvc.stage"])

    def _write(self) -> None:
        """The thread: connect, then write every few seconds, and connect anew after a failure."""
        pause = 0.0
        while True:
            ending = self._wake.wait(pause) and self._end is not None
            pause = _EVERY
            try:
                if self._store is None:
                    self._connect()
                self._flush()
                if ending:
                    self._terminate()
                    self._done = True
            except Exception as error:
                # Whatever MLflow raises, the training is worth more; what may have been written is read again.
                self._store, pause = None, _RETRY
                log.log(
                    logging.DEBUG if self._warned else logging.WARNING,
                    "mlflow: cannot log to %s; training goes on, `dvc repro` logs it later (%s)",
                    store.shown(), _first_line(error),
                )  # fmt: skip
                self._warned = True
            if ending:
                return

    def _connect(self) -> None:
        """Find the run of the same stage and fingerprint, or make it, and read which points it has already."""
        opened = store.open_store(self._experiment)
        wanted = {key.replace(".", "__"): value for key, value in self._keys.items()}
        found = opened.search(**wanted)
        # Where a finished training is repeated by force, its run is opened again.
        run = next((run for run in found if run.info.status == "FINISHED"), found[-1] if found else None)
        if run is None:
            self._run_id = create(opened, self._name, self._params, {**store.git_tags(Path.cwd()), **self._tags})
        else:
            self._run_id = run.info.run_id
            opened.client.update_run(self._run_id, status="RUNNING")
            self._known = points(opened, run)
        self._store = opened

    def _flush(self) -> None:
        with self._lock:
            pending = list(self._pending)
        new = []
        for key, value, moment, step in pending:
            # MLflow would draw a step that is logged twice as two points.
            if (key, step) in self._known:
                self._contradicted |= not math.isclose(self._known[key, step], value, rel_tol=1e-6)
            else:
                new.append((key, value, moment, step))
        if new:
            assert self._store is not None
            log_points(self._store, self._run_id, new)
            self._known.update({(key, step): value for key, value, _, step in new})
        with self._lock:
            del self._pending[: len(pending)]

    def _terminate(self) -> None:
        assert self._store is not None and self._end is not None
        client, (status, output_md5) = self._store.client, self._end
        if status == "FINISHED":
            earlier = client.get_run(self._run_id).data.tags.get("output_md5", output_md5)
            if self._contradicted or earlier != output_md5:
                # Other numbers from the same inputs (another machine): its points are a mixture of both.
                client.delete_run(self._run_id)
                log.info("mlflow: not the numbers of the earlier run; `track` logs this one from its history")
                return
            conclude(self._store, self._run_id, self._keys["dvc.stage"], output_md5)
        else:
            client.set_terminated(self._run_id, status)


def training_run(
    experiment: str,
    *,
    stage: str,
    fingerprint: str,
    params: Mapping[str, Any],
    name: str | None = None,
    tags: Mapping[str, str] | None = None,
) -> TrainingRun:
    """Open the run of a training: a killed one of the same stage and fingerprint is resumed, no point is logged twice.

    Parameters
    ----------
    experiment: MLflow experiment (`track.experiment`).
    stage: the stage as DVC calls it, e.g. `train@layers.6.mlp`.
    fingerprint: see `babelscope.core.fingerprint.fingerprint`.
    params: what the stage depends on, as in dvc.yaml, e.g. `{"seed": 0, "train": {...}}`; logged flat, as `train.k`.
    name: of the run; default `training_name(stage, params)`, the name that a rebuilt run gets, too.
    tags: further tags.
    """
    flat = flatten(params)
    return TrainingRun(experiment, stage, fingerprint, name or training_name(stage, flat), flat, tags or {})


def training_name(stage: str, params: Mapping[str, str]) -> str:
    """A name that tells trainings apart, e.g. `layers.6.mlp k=32 latents=4608`, from the flat params."""
    knobs = [f"{key}={params[f'train.{key}']}" for key in ("k", "latents") if f"train.{key}" in params]
    return " ".join([stage.partition("@")[2] or stage, *knobs])


def flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested params as MLflow's flat text ones: `{"train": {"k": 4}}` becomes `{"train.k": "4"}`, a list `a, b`."""
    flat: dict[str, str] = {}
    for key, value in params.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple):
            flat[f"{prefix}{key}"] = ", ".join(map(str, value))
        else:
            flat[f"{prefix}{key}"] = json.dumps(value) if value is None or isinstance(value, bool) else str(value)
    return flat


def create(opened: store.Store, name: str, params: Mapping[str, str], tags: Mapping[str, str]) -> str:
    """Make a run with its params and tags; returns its id."""
    from mlflow.entities import Param

    run = opened.client.create_run(
        opened.experiment_id, run_name=redact(name), tags={k: redact(v) for k, v in tags.items()}
    )
    # MLflow takes 100 params in a call, and no value of more than 6000 characters.
    entries = [Param(key, redact(value)[:6000]) for key, value in params.items()]
    for start in range(0, len(entries), 100):
        opened.client.log_batch(run.info.run_id, params=entries[start : start + 100])
    return str(run.info.run_id)


def conclude(opened: store.Store, run_id: str, stage: str, output_md5: str) -> None:
    """Tag a training run with its output and end it; it takes the place of others with the same output."""
    opened.client.set_tag(run_id, "output_md5", output_md5)
    opened.client.set_terminated(run_id, "FINISHED")
    for twin in opened.search(dvc__stage=stage, output_md5=output_md5):
        if twin.info.run_id != run_id:
            opened.client.delete_run(twin.info.run_id)


def points(opened: store.Store, run: Any) -> Points:
    """Every point that a run has, by metric and step."""
    histories = (opened.client.get_metric_history(run.info.run_id, key) for key in run.data.metrics)
    return {(point.key, point.step): point.value for history in histories for point in history}


def log_points(opened: store.Store, run_id: str, values: Iterable[tuple[str, float, int, int]]) -> None:
    """Log (metric, value, milliseconds since 1970, step) in as few calls as MLflow allows."""
    from mlflow.entities import Metric

    metrics = [Metric(*value) for value in values]
    for start in range(0, len(metrics), _BATCH):
        opened.client.log_batch(run_id, metrics=metrics[start : start + _BATCH])


def read_history(path: Path) -> Points:
    """The points of a history file: CSV with a column `step`, the other columns metrics; empty cells are no points."""
    import polars as pl

    table = pl.read_csv(path).with_columns(pl.all().exclude("step").cast(pl.Float64))
    return {
        (key, row["step"]): value
        for row in table.iter_rows(named=True)
        for key, value in row.items()
        if key != "step" and value is not None and math.isfinite(value)
    }


def _first_line(error: Exception) -> str:
    text = redact(str(error)).strip() or type(error).__name__
    return text.splitlines()[0][:200]
