"""The tracking store (MLflow's defaults in the root of the repository, or the user's server), and writing runs."""

import json
import logging
import os
import re
import sqlite3
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit
from urllib.request import url2pathname

from filelock import FileLock

from babelscope.core.git import git
from babelscope.core.redact import redact
from babelscope.tracking import view

log = logging.getLogger(__name__)

Points = dict[tuple[str, int], float]  # the value of a metric at a step

# A user's own settings win. With MLflow's own, a dead server would stop the pipeline for ten minutes.
_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}
# MLflow's limits: metrics and params in one call, characters of a param.
_METRICS, _PARAMS, _CHARACTERS = 1000, 100, 6000


@dataclass(frozen=True)
class Store:
    """An open tracking store: an `mlflow.MlflowClient`, and the experiment that holds all runs."""

    client: Any
    experiment_id: str

    def search(self, **tags: str) -> list[Any]:
        """The runs that have all these tags (`__` in a name means a dot), oldest first."""
        wanted = [f"tags.`{key.replace('__', '.')}` = '{value}'" for key, value in tags.items()]
        order = ["attributes.start_time ASC"]
        return list(self.client.search_runs([self.experiment_id], " and ".join(wanted), order_by=order))

    def create(self, name: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> str:
        """Start a run with its params (nested or flat) and tags, without credentials; returns its id."""
        from mlflow.entities import Param

        tags = {key: redact(value) for key, value in tags.items()}
        run_id = str(self.client.create_run(self.experiment_id, run_name=redact(name), tags=tags).info.run_id)
        entries = [Param(key, redact(value)[:_CHARACTERS]) for key, value in flatten(params).items()]
        for start in range(0, len(entries), _PARAMS):
            self.client.log_batch(run_id, params=entries[start : start + _PARAMS])
        return run_id

    def log(self, run_id: str, points: Iterable[tuple[str, float, int, int]]) -> None:
        """Log (metric, value, milliseconds since 1970, step); `_` replaces what MLflow forbids in a metric's name."""
        from mlflow.entities import Metric

        metrics = [Metric(re.sub(r"[^\w.\- :/]", "_", name), *point) for name, *point in points]
        for start in range(0, len(metrics), _METRICS):
            self.client.log_batch(run_id, metrics=metrics[start : start + _METRICS])

    def points(self, run: Any) -> Points:
        """Every point that a run has."""
        histories = (self.client.get_metric_history(run.info.run_id, name) for name in run.data.metrics)
        return {(point.key, point.step): point.value for history in histories for point in history}

    def conclude(self, run_id: str, stage: str, output_md5: str) -> None:
        """End a training run and tag it with its output; it replaces other runs with the same output."""
        self.client.set_terminated(run_id, "FINISHED")
        self.client.set_tag(run_id, "output_md5", output_md5)
        for twin in self.search(dvc__stage=stage, output_md5=output_md5):
            if twin.info.run_id != run_id:
                self.client.delete_run(twin.info.run_id)


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


def root() -> Path:
    """The main checkout: `dvc exp run --temp` and the queue work in copies of it, whose runs belong to it."""
    if "DVC_ROOT" in os.environ:
        return Path(os.environ["DVC_ROOT"]).absolute()
    current = Path.cwd()
    copies = (folder for folder in (current, *current.parents) if folder.parts[-3:] == (".dvc", "tmp", "exps"))
    return next((folder.parents[2] for folder in copies), current)


def database() -> Path | None:
    """The file of the default store, or None if `MLFLOW_TRACKING_URI` names another."""
    return None if os.environ.get("MLFLOW_TRACKING_URI") else root() / "mlflow.db"


def uri() -> str:
    """The tracking URI in force."""
    return os.environ.get("MLFLOW_TRACKING_URI") or _sqlite(root() / "mlflow.db")


def shown() -> str:
    """The tracking URI without a password."""
    return redact(uri())


def _sqlite(path: Path) -> str:
    """The URI of a database file.

    SQLAlchemy decodes a URI and cuts it at `?`; MLflow creates the folder in it without decoding. If the two would use
    different folders, the path is made relative to the current one, which is the repository or below it.
    """
    text = str(path)
    if any(character in text for character in "%?#"):
        text = quote(os.path.relpath(path), safe="/ +")
    return f"sqlite:///{text}"


def _artifacts(experiment: str) -> str:
    """The artifact location of an experiment: a path, or a URI if MLflow would read `%` as an escape."""
    folder = root() / "mlruns" / folder_of(experiment)
    return folder.as_uri() if "%" in str(folder) else str(folder)


def folder_of(experiment: str) -> str:
    """A folder name for an experiment, without `/` or leading dots, which could lead to other folders."""
    return re.sub(r"^\.+|[^\w. -]", "_", experiment)[:100]


def local_folder(location: str) -> Path | None:
    """The local folder of an artifact location of MLflow, or None if it is remote."""
    parts = urlsplit(location)
    return {"": Path(location), "file": Path(url2pathname(parts.path))}.get(parts.scheme)


def lock() -> FileLock:
    """A lock that one process of this repository can hold at a time."""
    return FileLock(root() / "mlflow.db.lock", is_singleton=True)


def open_store(experiment: str) -> Store:
    """Open the store and the experiment; create both if missing. Any number of processes may do so at once.

    Raises
    ------
    mlflow.exceptions.MlflowException, OSError: the store cannot be reached or read.
    """
    for key, value in _SETTINGS.items():
        os.environ.setdefault(key, value)
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    path = database()
    if path is not None and not path.exists():
        with lock():
            if not path.exists():
                _make(path)
    client = MlflowClient(uri())
    found = client.get_experiment_by_name(experiment)
    if found is None:
        try:
            # MLflow would put the artifacts below the current folder, which may be a temporary one.
            client.create_experiment(experiment, artifact_location=_artifacts(experiment) if path is not None else None)
        except MlflowException:
            if client.get_experiment_by_name(experiment) is None:  # no other process has just created it
                raise
        found = client.get_experiment_by_name(experiment)
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    for key, value in view.experiment_tags(found.experiment_id).items():
        if key not in found.tags:  # the note may be the user's own, and `sync` fits the view to the runs
            client.set_experiment_tag(found.experiment_id, key, value)
    if path is not None and found.artifact_location != _artifacts(experiment):
        _follow(path, found.artifact_location, experiment)
    return Store(client, found.experiment_id)


def _make(path: Path) -> None:
    """Create the database, whole or not at all."""
    from mlflow import MlflowClient

    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    MlflowClient(_sqlite(draft)).search_experiments(max_results=1)  # creates the tables
    # A write-ahead log lets the pages be read while a training writes; the setting stays with the file.
    with closing(sqlite3.connect(draft)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
    for leftover in path.parent.glob(f"{path.name}-*"):
        leftover.unlink()  # of a deleted database: SQLite would read it into the new one
    draft.rename(path)


def _follow(path: Path, location: str, experiment: str) -> None:
    """Update MLflow's artifact locations, which are absolute paths, after the repository was moved or copied.

    MLflow has no function for this, so only this function writes to its tables, if they have the expected columns.
    """
    folder = local_folder(location)
    if folder is None or folder.parts[-2:] != ("mlruns", folder_of(experiment)):
        return  # the user's own location
    old, new = (f"{text.rpartition('/')[0]}/" for text in (location, _artifacts(experiment)))
    columns = {"experiments": "artifact_location", "runs": "artifact_uri"}
    try:
        with closing(sqlite3.connect(path, timeout=20)) as connection, connection:
            for table, column in columns.items():
                if column not in [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]:
                    raise sqlite3.DatabaseError(f"this version of MLflow has no column {table}.{column}")
            for table, column in columns.items():
                connection.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?",
                    (new, len(old) + 1, len(old), old),
                )
    except sqlite3.Error as error:
        log.warning("mlflow: the repository was moved from %s, where MLflow still looks for its artifacts (%s)",
                    old, error)  # fmt: skip
    else:
        log.warning("mlflow: the repository was moved from %s; MLflow now looks for its artifacts here", old)


def stamp(experiment: str) -> str:
    """A text that changes at every write to the default store; empty for a server. Imports no MLflow."""
    path = database()
    if path is None or not path.exists():
        return ""
    file, ahead, artifacts = path.stat(), Path(f"{path}-wal"), root() / "mlruns" / folder_of(experiment)
    version = [file.st_ino, file.st_mtime_ns, file.st_size, ahead.stat().st_size if ahead.exists() else 0]
    return json.dumps([*version, str(artifacts), sorted(os.listdir(artifacts)) if artifacts.is_dir() else []])


def settle() -> None:
    """Empty the write-ahead log of the default store, so that `stamp` stays the same when this process ends."""
    if (path := database()) is not None:
        with closing(sqlite3.connect(path, timeout=20)) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def first_line(error: Exception) -> str:
    """What an exception says, in one short line without credentials."""
    text = redact(str(error)).strip() or type(error).__name__
    return text.splitlines()[0][:200]


def git_tags(folder: Path) -> dict[str, str]:
    """MLflow's own tags for the commit and branch that `folder` is at, and the DVC experiment that is running."""
    tags = {
        "mlflow.source.git.commit": (git(folder, "rev-parse", "HEAD") or "").strip(),
        "mlflow.source.git.branch": (git(folder, "branch", "--show-current") or "").strip(),
        "mlflow.source.name": "dvc.yaml",
        "mlflow.source.type": "PROJECT",
        "dvc.exp": os.environ.get("DVC_EXP_NAME", ""),
    }
    return {key: value for key, value in tags.items() if value}
