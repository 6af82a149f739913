"""Live MLflow runs of trainings, written by a thread so that tracking never delays or stops a training."""

import logging
import math
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from babelscope.config import Config
from babelscope.config.values import model_title
from babelscope.tracking import store

log = logging.getLogger(__name__)

# Seconds between two writes, between two attempts to reach a dead server, and to wait for the last write.
_EVERY, _RETRY, _LAST = 2.0, 30.0, 60.0


class TrainingRun:
    """The MLflow run of one training; the constructor returns at once, and a thread imports MLflow and writes.

    A training that ends within `track.live_after` seconds gets no run here, since MLflow's import would take seconds of
    its time; stage `track` logs it from its history. After that time, the thread also writes what was logged before.

    The run of a killed training of the same stage and fingerprint is resumed, and no point is logged twice. The context
    manager marks a run that did not `finish` as failed, or as killed if the user stopped it.

    Parameters
    ----------
    params: of the pipeline; `track` names the experiment, and `model` is in the name of the run.
    stage: the stage as DVC calls it, e.g. `train@layers.6.mlp`.
    fingerprint: see `babelscope.core.fingerprint.fingerprint`.
    used: what the stage depends on, as in params.yaml, e.g. `{"seed": 0, "train": {...}}`; logged flat, as `train.k`.
    resumes: whether the training resumes. It may then have a run, which it continues at once.
    """

    def __init__(
        self, params: Config, *, stage: str, fingerprint: str, used: Mapping[str, Any], resumes: bool = False
    ) -> None:
        self._experiment, self._live_after = params.track.experiment, 0.0 if resumes else params.track.live_after
        self._params = {**used, "model": params.model.model_dump()}
        self._keys = {"dvc.stage": stage, "babelscope.fingerprint": fingerprint}
        self._store: store.Store | None = None
        self._run_id, self._known = "", store.Points()
        self._contradicted = False
        self._pending: list[tuple[str, float, int, int]] = []
        self._lock, self._wake = threading.Lock(), threading.Event()
        self._end: tuple[str, str] | None = None
        self._warned = self._done = False
        self._thread = threading.Thread(target=self._write, name="mlflow", daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Queue the metrics of one step, to be written within seconds. Values that are not finite are left out."""
        now = int(time.time() * 1000)
        points = [(name, float(value), now, step) for name, value in metrics.items() if math.isfinite(value)]
        with self._lock:
            self._pending += points

    def finish(self, output_md5: str, history: Iterable[Mapping[str, float]]) -> None:
        """Write what is left and end the run.

        Parameters
        ----------
        output_md5: the `dvc_md5` of the training's output folder.
        history: one row per logged step, with `step`. A training that was killed before it was live has logged only the
            steps after its checkpoint; the history has all.
        """
        for row in history:
            self.log(int(row["step"]), {name: value for name, value in row.items() if name != "step"})
        self._close("FINISHED", output_md5)

    def __enter__(self) -> "TrainingRun":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._end is None:
            self._close("FAILED" if kind is None or issubclass(kind, Exception) else "KILLED", "")

    def _close(self, status: str, output_md5: str) -> None:
        self._end = (status, output_md5)
        self._wake.set()
        self._thread.join(_LAST)
        if not self._done:
            log.warning("mlflow: the run of %s is incomplete; `dvc repro` completes it", self._keys["dvc.stage"])

    def _write(self) -> None:
        """The thread: connect, then write every few seconds, and connect again after a failure."""
        if self._wake.wait(self._live_after):
            self._done = self._live_after > 0
        pause = 0.0
        while not self._done:
            ending = self._wake.wait(pause) and self._end is not None
            pause = _EVERY
            try:
                if self._store is None:
                    self._store = self._connect()
                self._flush(self._store)
                if ending:
                    self._terminate(self._store)
                    self._done = True
            except Exception as error:
                # Tracking must never stop a training. The next connection reads which points were logged.
                self._store, pause = None, _RETRY
                log.log(
                    logging.DEBUG if self._warned else logging.WARNING,
                    "mlflow: cannot log to %s; training goes on, `dvc repro` logs it later (%s)",
                    store.shown(), store.first_line(error),
                )  # fmt: skip
                self._warned = True
                if ending:
                    return

    def _connect(self) -> store.Store:
        """Find the unfinished run of the same stage and fingerprint, with the points that it has, or create a run."""
        opened = store.open_store(self._experiment)
        found = opened.search(**{key.replace(".", "__"): value for key, value in self._keys.items()})
        unfinished = [run for run in found if "output_md5" not in run.data.tags]
        if unfinished:
            self._run_id = unfinished[-1].info.run_id
            self._known = opened.points(unfinished[-1])
            opened.client.update_run(self._run_id, status="RUNNING")
        else:
            tags = {**store.git_tags(Path.cwd()), **self._keys, "babelscope.kind": "training"}
            name = training_name(self._keys["dvc.stage"], self._params)
            self._run_id, self._known = opened.create(name, self._params, tags), {}
        return opened

    def _flush(self, opened: store.Store) -> None:
        with self._lock:
            pending = list(self._pending)
        new: dict[tuple[str, int], tuple[str, float, int, int]] = {}
        for name, value, moment, step in pending:
            # MLflow would draw a step that is logged twice as two points.
            if (name, step) in self._known:
                self._contradicted |= not math.isclose(self._known[name, step], value, rel_tol=1e-6)
            else:
                new.setdefault((name, step), (name, value, moment, step))
        opened.log(self._run_id, new.values())
        self._known |= {key: point[1] for key, point in new.items()}
        with self._lock:
            del self._pending[: len(pending)]

    def _terminate(self, opened: store.Store) -> None:
        assert self._end is not None
        status, output_md5 = self._end
        if not output_md5:
            opened.client.set_terminated(self._run_id, status)
        elif self._contradicted:
            # Other numbers than before the kill (another machine): the run has points of both.
            opened.client.delete_run(self._run_id)
            log.info("mlflow: other numbers than in the killed run; `track` logs this training from its history")
        else:
            opened.conclude(self._run_id, self._keys["dvc.stage"], output_md5)


def training_name(stage: str, params: Mapping[str, Any]) -> str:
    """A name that tells trainings apart, e.g. `SAE layers.6.mlp gemma-3-270m k=32 latents=4608`."""
    return f"SAE {stage.partition('@')[2] or stage} {describe(params)}".strip()


def describe(params: Mapping[str, Any]) -> str:
    """The model and the SAEs for the name of a run, e.g. `gemma-3-270m k=32 latents=4608`, as far as `params` has them.

    A GGUF model has the file's name without the quantisation, any other the last part of its hub id.
    """
    flat = store.flatten(params)
    words = [model_title(params.get("model", {})).rpartition("/")[2]]
    if flat.get("train.source") == "pretrained":
        words.append(flat["pretrained.name"].rpartition("/")[2])
    else:
        words += [f"{key}={flat[f'train.{key}']}" for key in ("k", "latents") if f"train.{key}" in flat]
    return " ".join(filter(None, words))
