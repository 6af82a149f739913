"""Bring MLflow in line with the pipeline's state: each training's run, and one summary run of the state."""

import json
import logging
import math
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl

from babelscope.config import read_yaml
from babelscope.config.values import expanded
from babelscope.core.files import read_json, read_table
from babelscope.core.fingerprint import texts_md5
from babelscope.core.paths import Paths
from babelscope.core.redact import redact
from babelscope.tracking import state as states
from babelscope.tracking import store, summary, view
from babelscope.tracking.training import describe, training_name

log = logging.getLogger(__name__)


def sync(paths: Paths) -> None:
    """Log the parts of the pipeline's state that MLflow does not have yet; nothing is logged twice.

    A server that is down costs only a warning: the next `dvc repro` logs what is missing.

    Raises
    ------
    UserError: dvc.lock or params.yaml is missing or damaged.
    """
    started = time.monotonic()
    # Not validated, like dvc.lock: validation adds keys that the file leaves out.
    params = read_yaml(paths.root / "params.yaml")
    state, experiment = states.read(paths.root, params), params["track"]["experiment"]
    if state.outdated:
        log.warning("track: dvc.lock is older than params.yaml (%s): run `dvc repro`", ", ".join(state.outdated))
        return
    if changed := changed_texts(paths, params):
        log.warning(
            "corpus.path: the files in %s are not those that `sample` read, and DVC does not watch this folder: run "
            "`dvc repro -f -s sample`, then `dvc repro`", changed,
        )  # fmt: skip
    # This file names the last state that was logged, since importing MLflow takes two seconds.
    memory = store.root() / "mlflow.db.tracked"
    if memory.is_file() and memory.read_text() == f"{state.hash} {store.stamp(experiment)}":
        log.info("track: state %s is in MLflow already", state.hash[:7])
        return
    try:
        with store.lock():
            opened = store.open_store(experiment)
            trainings = [_training(opened, paths.root, entry) for entry in state.trainings]
            is_new = _summary(opened, paths, params, state)
            store.settle()
    except Exception as error:
        if not _is_unreachable(error):
            raise
        reason = store.first_line(error)
        log.warning("track: cannot log to %s; the next `dvc repro` will (%s)", store.shown(), reason)
        return
    if None not in trainings and (stamp := store.stamp(experiment)):
        memory.write_text(f"{state.hash} {stamp}")
    log.info(
        "track: state %s %s, %d training runs logged, in experiment %r at %s (%.1f s)",
        state.hash[:7], "logged" if is_new else "is in MLflow already", trainings.count(True), experiment,
        store.shown(), time.monotonic() - started,
    )  # fmt: skip


def changed_texts(paths: Paths, params: Mapping[str, Any]) -> Path | None:
    """The folder `corpus.path` if its hash is not the one in `paths.sources`, else None."""
    name = params.get("corpus", {}).get("path")
    if name is None or not paths.sources.is_file() or not (folder := paths.root / expanded(name)).is_dir():
        return None
    read = {entry["revision"] for entry in read_json(paths.sources)["sources"]} - {None}
    return folder if read and texts_md5(folder) not in read else None


def _is_unreachable(error: Exception) -> bool:
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return isinstance(error, MlflowException | OSError | SQLAlchemyError | sqlite3.Error)


def _training(opened: store.Store, folder: Path, entry: states.Training) -> bool | None:
    """Give a training its one finished run; returns whether it had to be logged, None if it cannot be logged."""
    if opened.search(dvc__stage=entry.stage, output_md5=entry.output_md5):
        return False
    history = folder / entry.output / "history.csv"
    if not history.is_file():
        log.warning("track: %s: no such file; the run of %s is not logged; run `dvc checkout`", history, entry.stage)
        return None
    points = read_history(history)
    run_id, known = _unfinished(opened, entry, points) or ("", {})
    if not run_id:
        tags = {"dvc.stage": entry.stage, "babelscope.kind": "training", "babelscope.backfilled": "true"}
        run_id = opened.create(training_name(entry.stage, entry.params), entry.params, tags)
    _log(opened, run_id, {key: value for key, value in points.items() if key not in known})
    opened.conclude(run_id, entry.stage, entry.output_md5)
    return True


def read_history(path: Path) -> store.Points:
    """The points of a history file: CSV with the column `step` and a column per metric; empty cells are no points."""
    table = pl.read_csv(path).with_columns(pl.all().exclude("step").cast(pl.Float64))
    points = table.unpivot(index="step").select("variable", "step", "value").iter_rows()
    return {(name, step): value for name, step, value in points if value is not None and math.isfinite(value)}


def _unfinished(opened: store.Store, entry: states.Training, points: store.Points) -> tuple[str, store.Points] | None:
    """The unfinished run of this training (it lost its server, for example), whose points are all in the history."""
    for run in opened.search(dvc__stage=entry.stage, babelscope__kind="training"):
        known = {} if "output_md5" in run.data.tags else opened.points(run)
        if known and all(math.isclose(points.get(key, math.nan), known[key], rel_tol=1e-6) for key in known):
            return run.info.run_id, known
    return None


def _log(opened: store.Store, run_id: str, points: store.Points) -> None:
    now = int(time.time() * 1000)
    opened.log(run_id, [(name, value, now, step) for (name, step), value in points.items()])


def _summary(opened: store.Store, paths: Paths, params: Mapping[str, Any], state: states.State) -> bool:
    """Give the state its one summary run; returns whether it had to be written."""
    found = opened.search(dvc__state=state.hash, babelscope__kind="summary")
    whole = [run for run in found if run.info.status == "FINISHED" and _is_whole(run)]
    for run in found:
        if run not in whole[:1]:
            opened.client.delete_run(run.info.run_id)  # half-written, by an older version, or its artifacts are gone
    if whole:
        return False
    metrics = summary.read_metrics(paths.root / "metrics")
    figures, series = summary.numbers(paths, params, metrics)
    tags = {
        **store.git_tags(paths.root),
        "babelscope.kind": "summary",
        "dvc.state": state.hash,
        "mlflow.note.content": summary.note(params, metrics, state.hash),
    }
    logged = {key: value for key, value in params.items() if key not in ("hardware", "track")}
    run_id = opened.create(_name(opened, logged, state.hash), logged, tags)
    _log(opened, run_id, {(name, 0): value for name, value in figures.items()} | series)
    _dataset(opened, run_id, paths, state)
    opened.client.log_table(run_id, summary.language_table(figures, params["languages"]), "languages.json")
    with tempfile.TemporaryDirectory() as copies:
        _collect(paths, Path(copies))
        opened.client.log_artifacts(run_id, copies)
    opened.client.set_terminated(run_id, "FINISHED")
    before = opened.client.get_experiment(opened.experiment_id).tags.get(view.TAG, "")
    opened.client.set_experiment_tag(opened.experiment_id, view.TAG, view.saved(series, params["languages"], before))
    return True


def _name(opened: store.Store, params: Mapping[str, Any], state_hash: str) -> str:
    """The model, and up to three params that differ from the last summary run, else the SAEs; the state's hash."""
    changed = {}
    for last in opened.search(babelscope__kind="summary")[-1:]:
        known = {key: redact(value) for key, value in store.flatten(params).items()}
        changed = {key: value for key, value in known.items() if last.data.params.get(key, "")[:500] != value[:500]}
    changed = {key: value for key, value in changed.items() if not key.startswith("model.") and len(value) <= 30}
    if not 0 < len(changed) <= 3:
        return f"{describe(params)} {state_hash[:7]}"
    words = [describe({"model": params["model"]}), *(f"{key}={value}" for key, value in changed.items())]
    return " ".join([*words, state_hash[:7]])


def _is_whole(run: Any) -> bool:
    """Whether a run has all metrics, and its artifacts exist (checked for local folders only)."""
    folder = store.local_folder(str(run.info.artifact_uri))
    return view.X_AXIS in run.data.metrics and (folder is None or folder.is_dir())


def _dataset(opened: store.Store, run_id: str, paths: Paths, state: states.State) -> None:
    """Log the corpus as the run's data set, with the start of its MD5 in DVC as digest."""
    name = paths.texts.relative_to(paths.root).as_posix()
    if name not in state.outputs or not paths.texts.is_file():
        return
    import mlflow.data
    from mlflow.data.dataset_source_registry import get_dataset_source_from_json
    from mlflow.entities import Dataset, DatasetInput, InputTag

    source = get_dataset_source_from_json(json.dumps({"uri": name}), "local")
    texts, digest = read_table(paths.texts), state.outputs[name][:8]
    data = Dataset(**mlflow.data.from_polars(texts, source=source, name="texts", digest=digest).to_dict())
    opened.client.log_inputs(run_id, [DatasetInput(data, [InputTag("mlflow.data.context", "corpus")])])


def _collect(paths: Paths, target: Path) -> None:
    """Copy what the run keeps: the pages and their pictures, the features, and the two files that define the state."""
    for path in sorted(paths.reports.glob("*")):
        if path.suffix in (".html", ".png"):
            shutil.copy(path, target)
    if paths.features.is_file():
        read_table(paths.features).write_csv(target / "features.csv")
    (target / "pipeline").mkdir()
    for name in ("dvc.lock", "params.yaml"):
        shutil.copy(paths.root / name, target / "pipeline")
