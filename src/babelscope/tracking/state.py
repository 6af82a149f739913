"""The state of the pipeline as dvc.lock has it: what was computed, from what, and its hash."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from babelscope.config import read_yaml
from babelscope.core.errors import UserError
from babelscope.tracking.training import flatten


@dataclass(frozen=True)
class Training:
    """A training that dvc.lock describes: stage, flat params, and its output folder with its MD5 (`<md5>.dir`)."""

    stage: str
    params: Mapping[str, str]
    output: str
    output_md5: str


@dataclass(frozen=True)
class State:
    """The current stages together: their hash, their trainings, and the MD5 of every file that they read or wrote.

    Of `files` those that they wrote are `outputs`; `outdated` names the stages whose entry was written with other
    params than the present ones.
    """

    hash: str
    trainings: list[Training]
    files: Mapping[str, str]
    outputs: Mapping[str, str]
    outdated: list[str]


def read(folder: Path, params: Mapping[str, Any], without: str = "track") -> State:
    """Read the state of the pipeline in `folder` from its dvc.yaml and dvc.lock.

    Parameters
    ----------
    params: the content of params.yaml; of its lists are the current hookpoints, dvc.lock keeps removed ones as well.
    without: the stage that asks, which is not a part of the state.

    Raises
    ------
    UserError: dvc.lock is missing, or it or dvc.yaml is not YAML.
    """
    if not (folder / "dvc.lock").is_file():
        raise UserError(f"{folder / 'dvc.lock'}: no such file; `dvc repro` writes it")
    try:
        return _read(read_yaml(folder / "dvc.lock") or {}, read_yaml(folder / "dvc.yaml"), params, without)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{folder / 'dvc.lock'}: not as DVC writes it ({type(error).__name__}: {error}); git checkout dvc.lock, or "
            "remove it and run dvc repro"
        ) from None


def _read(lock: Any, pipeline: Any, params: Mapping[str, Any], without: str) -> State:
    locked, defined = lock.get("stages", {}), pipeline["stages"]
    names = [name for name in sorted(locked) if name != without and _is_current(name, defined, params)]
    stages = {name: locked[name] for name in names}
    content = {
        name: {
            "deps": _hashes(entry.get("deps", [])),
            "outs": _hashes(entry.get("outs", [])),
            "params": _params(entry),
        }
        for name, entry in stages.items()
    }
    text = json.dumps(content, sort_keys=True)
    return State(
        hash=hashlib.sha256(text.encode()).hexdigest()[:32],
        trainings=[_training(name, stages[name]) for name in stages if _is_training(name, params)],
        files={path: md5 for part in content.values() for path, md5 in {**part["deps"], **part["outs"]}.items()},
        outputs={path: md5 for part in content.values() for path, md5 in part["outs"].items()},
        outdated=[
            name for name, entry in stages.items() if any(_get(params, k) != v for k, v in _params(entry).items())
        ],
    )


def _is_training(name: str, params: Mapping[str, Any]) -> bool:
    return name.partition("@")[0] == "train" and _get(params, "train.source") != "pretrained"


def _is_current(name: str, defined: Mapping[str, Any], params: Mapping[str, Any]) -> bool:
    base, at, item = name.partition("@")
    if base not in defined or bool(at) != ("matrix" in defined[base]):
        return False
    # `matrix: {hookpoint: ${hookpoints}}`: each matrix names the list in params.yaml that it is of.
    return not at or item in _get(params, defined[base]["matrix"]["hookpoint"].strip("${}"))


def _hashes(entries: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    return {entry["path"]: str(entry.get(entry.get("hash", "md5"))) for entry in entries}


def _params(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The params of a stage by dotted key, as dvc.lock has them."""
    return dict(entry.get("params", {}).get("params.yaml", {}))


def _get(params: Any, dotted: str) -> Any:
    for key in dotted.split("."):
        params = params.get(key) if isinstance(params, Mapping) else None
    return params


def _training(name: str, entry: Mapping[str, Any]) -> Training:
    outputs = {path: md5 for path, md5 in _hashes(entry["outs"]).items() if md5.endswith(".dir")}
    if len(outputs) != 1:
        raise UserError(f"dvc.lock: {name}: expected one output folder, found {', '.join(outputs) or 'none'}")
    [(output, md5)] = outputs.items()
    return Training(name, flatten(_params(entry)), output, md5)
