"""Bring MLflow in line with the pipeline's state: each training's run, and one summary run of the state."""

import json
import logging
import math
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from babelscope.config.values import local_name
from babelscope.core.files import read_table
from babelscope.core.redact import redact
from babelscope.report.numbers import plain, significant
from babelscope.tracking import state as states
from babelscope.tracking import store, summary, training, view

log = logging.getLogger(__name__)

TEXTS = "data/corpus/texts.parquet"
Metrics = Mapping[str, Mapping[str, Any]]  # the content of metrics/<name>.json by name


def sync(folder: Path, params: Mapping[str, Any]) -> None:
    """Log what MLflow does not have yet of the pipeline in `folder`; nothing is ever logged twice.

    A server that is down costs a warning, no more: the next `dvc repro` logs what is missing.

    Parameters
    ----------
    folder: where dvc.yaml, dvc.lock and the outputs lie.
    params: the content of params.yaml.

    Raises
    ------
    UserError: dvc.lock is missing.
    """
    started = time.monotonic()
    state = states.read(folder, params)
    experiment = params["track"]["experiment"]
    if state.outdated:
        log.warning("track: dvc.lock is older than params.yaml (%s): run `dvc repro`", ", ".join(state.outdated))
        return
    if store.holds(experiment, state.hash, [(t.stage, t.output_md5) for t in state.trainings]):
        log.info("track: state %s is in MLflow already", state.hash[:7])
        return
    try:
        with store.lock():
            opened = store.open_store(experiment)
            logged = sum(_training(opened, folder, entry) for entry in state.trainings)
            new = _summary(opened, folder, params, state)
    except Exception as error:
        if not _is_unreachable(error):
            raise
        reason = redact(str(error))[:300]
        log.warning("track: cannot log to %s; the next `dvc repro` does (%s)", store.shown(), reason)
        return
    log.info(
        "track: state %s %s, %d training runs logged, in experiment %r at %s (%.1f s)",
        state.hash[:7], "logged" if new else "is in MLflow already", logged, experiment, store.shown(),
        time.monotonic() - started,
    )  # fmt: skip


def _is_unreachable(error: Exception) -> bool:
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return isinstance(error, MlflowException | OSError | SQLAlchemyError)


def _training(opened: store.Store, folder: Path, entry: states.Training) -> bool:
    """Make sure that a training has its one finished run; returns whether something had to be logged."""
    found = opened.search(dvc__stage=entry.stage, output_md5=entry.output_md5)
    if found:
        if all(run.info.status != "FINISHED" for run in found):  # killed while it was repeated by force
            opened.client.set_terminated(found[0].info.run_id, "FINISHED")
        return False
    history = folder / entry.output / "history.csv"
    if not history.is_file():
        log.warning("track: %s: no such file; the run of %s is not logged: dvc checkout", history, entry.stage)
        return False
    points = training.read_history(history)
    run_id, known = _leftover(opened, entry, points) or (_backfilled(opened, entry), {})
    now = int(time.time() * 1000)
    missing = [(summary.metric_name(key), value, now, step) for (key, step), value in points.items()
               if (key, step) not in known]  # fmt: skip
    training.log_points(opened, run_id, missing)
    training.conclude(opened, run_id, entry.stage, entry.output_md5)
    return True


def _backfilled(opened: store.Store, entry: states.Training) -> str:
    tags = {"dvc.stage": entry.stage, "babelscope.kind": "training", "babelscope.backfilled": "true"}
    return training.create(opened, training.training_name(entry.stage, entry.params), entry.params, tags)


def _leftover(
    opened: store.Store, entry: states.Training, points: training.Points
) -> tuple[str, training.Points] | None:
    """The unfinished run of this very training (it lost its server, say): one whose points are all in the history."""
    for run in opened.search(dvc__stage=entry.stage, babelscope__kind="training"):
        if run.info.status == "FINISHED" or "output_md5" in run.data.tags:
            continue
        known = training.points(opened, run)
        if known and all(
            key in points and math.isclose(points[key], value, rel_tol=1e-6) for key, value in known.items()
        ):
            return run.info.run_id, known
    return None


def _summary(opened: store.Store, folder: Path, params: Mapping[str, Any], state: states.State) -> bool:
    """Make sure that the state has its one summary run; returns whether it had to be written."""
    found = opened.search(dvc__state=state.hash, babelscope__kind="summary")
    whole = [
        run
        for run in found
        if run.info.status == "FINISHED" and view.X_AXIS in run.data.metrics and _has_artifacts(run)
    ]
    for run in found:
        if not whole or run.info.run_id != whole[0].info.run_id:
            opened.client.delete_run(run.info.run_id)  # half-written, by an older version, or its artifacts are gone
    if whole:
        return False
    metrics = summary.read_metrics(folder / "metrics")
    figures, series = _numbers(folder, params, metrics)
    tags = {
        **store.git_tags(folder),
        "babelscope.kind": "summary",
        "dvc.state": state.hash,
        "mlflow.note.content": _note(params, metrics, state),
    }
    flat = training.flatten({key: value for key, value in params.items() if key not in ("hardware", "track")})
    released = flat.get("train.source") == "pretrained"
    what = flat["pretrained.name"] if released else f"k={flat['train.k']} latents={flat['train.latents']}"
    name = f"{what} {state.hash[:7]}"
    run_id = training.create(opened, name, flat, tags)
    now = int(time.time() * 1000)
    points = [(summary.metric_name(key), value, now, 0) for key, value in figures.items()]
    points += [(summary.metric_name(key), value, now, layer) for (key, layer), value in series.items()]
    training.log_points(opened, run_id, points)
    _dataset(opened, run_id, folder, state)
    opened.client.log_table(run_id, summary.language_table(figures, params["languages"]), "languages.json")
    with tempfile.TemporaryDirectory() as copies:
        _collect(folder, Path(copies))
        opened.client.log_artifacts(run_id, copies)
    opened.client.set_terminated(run_id, "FINISHED")
    return True


def _has_artifacts(run: Any) -> bool:
    """Whether the artifacts are where the run says; only a local folder can be asked cheaply."""
    location = str(run.info.artifact_uri)
    is_remote = urlsplit(location).scheme not in ("", "file")
    return is_remote or store.local_folder(location).is_dir()


def _numbers(folder: Path, params: Mapping[str, Any], metrics: Metrics) -> tuple[summary.Figures, summary.Series]:
    """The figures and the series over the layers of the files in `folder`."""
    languages, hookpoints = params["languages"], params["hookpoints"]
    figures, series = summary.figures(metrics, hookpoints, params.get("neurons", {}).get("hookpoints", []))
    series |= {(view.X_AXIS, layer): layer for layer, _ in summary.layers(hookpoints).values()}
    if (path := folder / "data/scores/features.parquet").is_file():
        features = read_table(path)
        figures |= summary.feature_figures(features, languages, hookpoints)
        series |= summary.feature_series(features, languages, hookpoints)
    if (path := folder / "data/ablation/by_layer.parquet").is_file():
        method = metrics.get("ablate", {}).get("primary_method", "feature")
        series |= summary.ablation_series(read_table(path), languages, hookpoints, method)
    return figures, series


def _note(params: Mapping[str, Any], metrics: Metrics, state: states.State) -> str:
    """A few lines that say what the run is, with the figures of the report's headline."""
    score, ablate = metrics.get("score", {}), metrics.get("ablate", {})
    members = params["score"]["members"]
    kind = "language-specific features" if members == 1 else f"features shared by exactly {members} languages"
    sentences = [
        f"{plain(score.get('features'))} {kind} of {len(params['languages'])} languages"
        f" at {len(params['hookpoints'])} hookpoints."
    ]
    if "effective_languages" in score:
        sentences.append(f"Effective languages of a feature: {plain(score['effective_languages'], 2)}.")
    if {"own", "others_abs"} <= set(ablate):
        sentences.append(
            f"Ablating a language's features changes its loss by {significant(ablate['own'], sign=True)} nats/token,"
            f" each other language's by {significant(ablate['others_abs'], digits=2)} in mean size."
        )
    # As code: MLflow shows a note as Markdown, and would fetch a picture that a name refers to.
    model = " ".join(local_name(params["model"]["name"]).replace("`", "'").split())
    return (
        f"`{model}`: {' '.join(sentences)}\n\n"
        f"DVC state `{state.hash}`; its dvc.lock and params.yaml are among the artifacts."
    )


def _dataset(opened: store.Store, run_id: str, folder: Path, state: states.State) -> None:
    """Name the corpus as the run's data set; its digest is the start of the MD5 that DVC knows it by."""
    if TEXTS not in state.files or not (folder / TEXTS).is_file():
        return
    import mlflow.data
    from mlflow.data.dataset_source_registry import get_dataset_source_from_json
    from mlflow.entities import DatasetInput, InputTag

    source = get_dataset_source_from_json(json.dumps({"uri": TEXTS}), "local")
    texts, digest = read_table(folder / TEXTS), state.files[TEXTS][:8]
    data = mlflow.data.from_polars(texts, source=source, name="texts", digest=digest)
    tags = [InputTag("mlflow.data.context", "corpus")]
    opened.client.log_inputs(run_id, [DatasetInput(data._to_mlflow_entity(), tags)])


def _collect(folder: Path, target: Path) -> None:
    """Copy what the run keeps: the pages and their pictures, the features, and the two files that define the state."""
    for ending in ("html", "png"):
        for path in sorted((folder / "reports").glob(f"*.{ending}")):
            shutil.copy(path, target)
    if (path := folder / "data/scores/features.parquet").is_file():
        read_table(path).write_csv(target / "features.csv")
    (target / "pipeline").mkdir()
    for name in ("dvc.lock", "params.yaml"):
        shutil.copy(folder / name, target / "pipeline")
