"""Where the runs lie: MLflow's own defaults in the root of the repository, or the server that the user names."""

import logging
import os
import re
import sqlite3
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit
from urllib.request import url2pathname

from filelock import FileLock

from babelscope.core.redact import redact
from babelscope.tracking import view

log = logging.getLogger(__name__)

# A user's own settings win. A dead server must not stop the pipeline for the ten minutes that MLflow would try.
_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "1",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}
# Without a kind, MLflow's pages ask the user what sort of experiment this is, and hide the charts until they know.
_EXPERIMENT_TAGS = {
    "mlflow.experimentKind": "custom_model_development",
    "mlflow.note.content": "One `summary` run per state of the DVC pipeline, one `training` run per SAE. "
    "Rebuilt from DVC's files by `dvc repro`.",
    **view.tag(),
}


@dataclass(frozen=True)
class Store:
    """An open tracking store.

    Parameters
    ----------
    client: the `mlflow.MlflowClient`.
    experiment_id: the experiment in which everything is looked for and logged.
    """

    client: Any
    experiment_id: str

    def search(self, **tags: str) -> list[Any]:
        """The runs that carry all these tags (`__` stands for a dot in a tag's name), oldest first."""
        wanted = [f"tags.`{key.replace('__', '.')}` = '{value}'" for key, value in tags.items()]
        order = ["attributes.start_time ASC"]
        return list(self.client.search_runs([self.experiment_id], " and ".join(wanted), order_by=order))


def root() -> Path:
    """The main checkout: `dvc exp run --temp` and the queue work in copies of it, whose runs belong to it."""
    if "DVC_ROOT" in os.environ:
        return Path(os.environ["DVC_ROOT"]).absolute()
    here = Path.cwd()
    for folder in (here, *here.parents):
        if folder.parts[-3:] == (".dvc", "tmp", "exps"):
            return folder.parents[2]
    return here


def database() -> Path | None:
    """The file of the default store, or None where `MLFLOW_TRACKING_URI` names another."""
    return None if os.environ.get("MLFLOW_TRACKING_URI") else root() / "mlflow.db"


def uri() -> str:
    """The tracking URI in force."""
    return os.environ.get("MLFLOW_TRACKING_URI") or _sqlite(root() / "mlflow.db")


def _sqlite(path: Path) -> str:
    """The URI of a database file.

    SQLAlchemy decodes a URI and cuts it at `?`, MLflow makes the folder that stands in it as it is. Where the two would
    not mean the same folder, the path is relative to the current one, which is the repository or below it.
    """
    text = str(path)
    if any(character in text for character in "%?#"):
        text = quote(os.path.relpath(path), safe="/ +")
    return f"sqlite:///{text}"


def _location(folder: Path) -> str:
    """A folder of artifacts as MLflow stores it: the path, or a URI where MLflow would take `%` for an escape."""
    return folder.as_uri() if "%" in str(folder) else str(folder)


def local_folder(location: str) -> Path:
    """The local folder that an artifact location of MLflow means."""
    return Path(url2pathname(urlsplit(location).path) if location.startswith("file:") else location)


def shown() -> str:
    """The tracking URI as it may be shown: without a password."""
    return redact(uri())


@contextmanager
def lock() -> Iterator[None]:
    """Only one process of this repository at a time."""
    path = root() / "mlflow.db.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path, is_singleton=True):
        yield


def open_store(experiment: str) -> Store:
    """Open the store and the experiment; make both where missing. Any number of processes may do so at once.

    Raises
    ------
    mlflow.exceptions.MlflowException, OSError: the store cannot be reached or read.
    """
    for key, value in _SETTINGS.items():
        os.environ.setdefault(key, value)
    from mlflow.tracking import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    path = database()
    if path is not None:
        _prepare(path)
    client = MlflowClient(uri())
    found = client.get_experiment_by_name(experiment)
    if found is None:
        return Store(client, _create(client, experiment))
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    for key, value in _EXPERIMENT_TAGS.items():  # made by hand, or by an older version; the note may be the user's own
        if key not in found.tags or (key in view.tag() and found.tags[key] != value):
            client.set_experiment_tag(found.experiment_id, key, value)
    return Store(client, found.experiment_id)


def _create(client: Any, experiment: str) -> str:
    """Make the experiment, or take the one that another process has just made."""
    from mlflow.exceptions import MlflowException

    # MLflow would put the artifacts beside the current folder, which may be a temporary one.
    place = _location(root() / "mlruns" / folder_of(experiment)) if database() is not None else None
    try:
        return str(client.create_experiment(experiment, artifact_location=place, tags=_EXPERIMENT_TAGS))
    except MlflowException:
        found = client.get_experiment_by_name(experiment)
        if found is None:
            raise
        return str(found.experiment_id)


def folder_of(experiment: str) -> str:
    """A folder's name for an experiment: nothing in it leads elsewhere, as `../` and `/` would."""
    return re.sub(r"^\.+|[^\w. -]", "_", experiment)[:100]


def _prepare(path: Path) -> None:
    """Make the database under a lock, whole or not at all, and let its artifacts follow a moved repository."""
    if not path.exists():
        with lock():
            if not path.exists():
                _make(path)
    _follow(path)


def _make(path: Path) -> None:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    store = SqlAlchemyStore(_sqlite(draft), _location(path.parent / "mlruns"))
    store.engine.dispose()
    # A write-ahead log lets the pages be read while a training writes; the setting stays with the file.
    with closing(sqlite3.connect(draft)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
    for leftover in path.parent.glob(f"{path.name}-*"):
        leftover.unlink()  # of a deleted database: SQLite would read it into the new one
    draft.rename(path)


def _follow(path: Path) -> None:
    """MLflow stores absolute artifact locations: turn those of a repository that was moved or copied to here."""
    here = f"{_location(path.parent / 'mlruns')}/"
    try:
        with closing(sqlite3.connect(path, timeout=20)) as connection, connection:
            # Experiment 0 is made with the database, and so remembers where that was.
            row = connection.execute("SELECT artifact_location FROM experiments WHERE experiment_id = 0").fetchone()
            there = str(row[0]).removesuffix("0") if row else here
            if there == here or not there.endswith("/mlruns/"):
                return
            log.warning("mlflow: the repository was moved from %s: its artifacts are now looked for here", there)
            for table, column in (("experiments", "artifact_location"), ("runs", "artifact_uri")):
                connection.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?",
                    (here, len(there) + 1, len(there), there),
                )
    except sqlite3.Error as error:  # an empty or foreign file: MLflow itself says what is wrong with it
        log.debug("mlflow: %s", error)


def holds(experiment: str, summary: str, outputs: Iterable[tuple[str, str]]) -> bool:
    """Whether the default store already has a state's runs, asked without the second that importing MLflow takes.

    Parameters
    ----------
    summary: hash of the pipeline state.
    outputs: stage and output MD5 of every training.

    Returns
    -------
    False also where the question cannot be answered this way (another store, another schema).
    """
    path = database()
    if path is None or not path.exists():
        return False
    wanted = [{"dvc.state": summary}, *({"dvc.stage": stage, "output_md5": md5} for stage, md5 in outputs)]
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=20)) as connection:
            found = [_places(connection, experiment, tags) for tags in wanted]
    except sqlite3.Error as error:
        log.debug("mlflow: %s", error)
        return False
    # A summary whose artifacts are gone is written anew; a training has none.
    return all(found) and local_folder(found[0][0]).is_dir()


def _places(connection: sqlite3.Connection, experiment: str, tags: dict[str, str]) -> list[str]:
    """Artifact locations of the finished runs that carry all these tags."""
    carries = "EXISTS (SELECT 1 FROM tags t WHERE t.run_uuid = r.run_uuid AND t.key = ? AND t.value = ?)"
    query = (
        "SELECT r.artifact_uri FROM runs r JOIN experiments e ON e.experiment_id = r.experiment_id "
        "WHERE e.name = ? AND e.lifecycle_stage = 'active' AND r.lifecycle_stage = 'active' AND r.status = 'FINISHED' "
        + "".join(f"AND {carries} " for _ in tags)
    )
    values = [part for pair in tags.items() for part in pair]
    return [str(place) for (place,) in connection.execute(query, [experiment, *values])]


def git_tags(folder: Path) -> dict[str, str]:
    """MLflow's own tags for the commit and branch that `folder` is at, and the DVC experiment that is running."""

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(
                ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=10
            )
        except (OSError, subprocess.SubprocessError):
            return ""  # no git, or no commit yet
        return done.stdout.strip()

    branch = git("rev-parse", "--abbrev-ref", "HEAD")
    tags = {
        "mlflow.source.git.commit": git("rev-parse", "HEAD"),
        "mlflow.source.git.branch": "" if branch == "HEAD" else branch,
        "mlflow.source.name": "dvc.yaml",
        "mlflow.source.type": "PROJECT",
        "dvc.exp": os.environ.get("DVC_EXP_NAME", ""),
    }
    return {key: value for key, value in tags.items() if value}
