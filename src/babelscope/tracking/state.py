"""The state of the pipeline in dvc.lock: params, inputs and outputs of every stage, and a hash of them."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from babelscope.config import read_yaml
from babelscope.core.errors import UserError
from babelscope.tracking.store import flatten


@dataclass(frozen=True)
class Training:
    """A training that dvc.lock describes: stage, flat params (and the model's), output folder and MD5 (`<md5>.dir`)."""

    stage: str
    params: Mapping[str, str]
    output: str
    output_md5: str


@dataclass(frozen=True)
class State:
    """The current stages together: their hash, their trainings, and the MD5 of every file and folder that they wrote.

    `outdated` names the stages whose entry in dvc.lock has other params than params.yaml.
    """

    hash: str
    trainings: list[Training]
    outputs: Mapping[str, str]
    outdated: list[str]


def read(folder: Path, params: Mapping[str, Any], without: str = "track") -> State:
    """Read the state of the pipeline in `folder` from its dvc.yaml and dvc.lock.

    Parameters
    ----------
    params: the content of params.yaml; its lists name the current hookpoints, while dvc.lock also keeps removed ones.
    without: a stage that is not part of the state.

    Raises
    ------
    UserError: dvc.lock is missing, or it or dvc.yaml is not YAML.
    """
    if not (folder / "dvc.lock").is_file():
        raise UserError(f"{folder / 'dvc.lock'}: no such file; `dvc repro` writes it")
    try:
        locked = (read_yaml(folder / "dvc.lock") or {}).get("stages", {})
        return _state(locked, read_yaml(folder / "dvc.yaml")["stages"], params, without)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{folder / 'dvc.lock'}: not as DVC writes it ({type(error).__name__}: {error}); run `git checkout "
            "dvc.lock`, or remove it and run `dvc repro`"
        ) from None


def _state(locked: Any, defined: Any, params: Mapping[str, Any], without: str) -> State:
    stages = {
        name: {
            "deps": _hashes(locked[name].get("deps", [])),
            "outs": _hashes(locked[name].get("outs", [])),
            "params": dict(locked[name].get("params", {}).get("params.yaml", {})),
        }
        for name in sorted(locked)
        if name != without and _is_current(name, defined, params)
    }
    pretrained = _get(params, "train.source") == "pretrained"
    return State(
        hash=hashlib.sha256(json.dumps(stages, sort_keys=True).encode()).hexdigest()[:32],
        trainings=[
            _training(name, stages[name], params) for name in stages if name.startswith("train@") and not pretrained
        ],
        outputs={path: md5 for stage in stages.values() for path, md5 in stage["outs"].items()},
        outdated=[
            name
            for name, stage in stages.items()
            if any(_get(params, key) != value for key, value in stage["params"].items())
        ],
    )


def _is_current(name: str, defined: Mapping[str, Any], params: Mapping[str, Any]) -> bool:
    base, separator, item = name.partition("@")
    if base not in defined or bool(separator) != ("matrix" in defined[base]):
        return False
    # `matrix: {hookpoint: ${hookpoints}}` names a list in params.yaml; the items of several lists are joined by `-`.
    lists = [_get(params, values.strip("${}")) for values in defined[base]["matrix"].values()] if separator else []
    return not separator or item in {"-".join(map(str, values)) for values in product(*lists)}


def _hashes(entries: Any) -> dict[str, str]:
    return {entry["path"]: str(entry.get(entry.get("hash", "md5"))) for entry in entries}


def _get(params: Any, dotted: str) -> Any:
    for key in dotted.split("."):
        params = params.get(key) if isinstance(params, Mapping) else None
    return params


def _training(name: str, stage: Mapping[str, Any], params: Mapping[str, Any]) -> Training:
    folders = {path: md5 for path, md5 in stage["outs"].items() if md5.endswith(".dir")}
    if len(folders) != 1:
        raise UserError(f"dvc.lock: {name}: expected one output folder, found {', '.join(folders) or 'none'}")
    [(output, md5)] = folders.items()
    return Training(name, flatten({**stage["params"], "model": params.get("model", {})}), output, md5)
