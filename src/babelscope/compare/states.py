"""A state of the repository: the params and figures of a git revision, a DVC experiment, or the working folder."""

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
import yaml

from babelscope.config.loading import YamlLoader
from babelscope.core.errors import UserError
from babelscope.core.files import read_json, read_table
from babelscope.core.git import git
from babelscope.core.paths import Paths

log = logging.getLogger(__name__)

# The name of the files as they are, as in DVC's commands.
WORKSPACE = "workspace"


@dataclass(frozen=True)
class State:
    """What a state says of itself.

    Attributes
    ----------
    name: as the user wrote it.
    commit: the commit, or "" for the working folder.
    params: the content of params.yaml, not validated, since the schema may have changed.
    metrics: metrics/<name>.json by name.
    nll: data/ablation/nll.parquet, or None if DVC has it neither in its cache nor in a remote.
    """

    name: str
    commit: str
    params: Mapping[str, Any]
    metrics: Mapping[str, Mapping[str, Any]]
    nll: pl.DataFrame | None = field(repr=False)

    def figure(self, stage: str, key: str) -> Any:
        """A figure of `metrics/<stage>.json`, or None."""
        return self.metrics.get(stage, {}).get(key)


def resolve(name: str, root: Path) -> str | None:
    """The commit of a git revision or of a DVC experiment's name, "" for `workspace`; None if there is none.

    Raises
    ------
    UserError: several experiments have this name.
    """
    if name == WORKSPACE:
        return ""
    if not name.startswith("-") and (found := git(root, "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}")):
        return found.strip()
    # DVC keeps an experiment at refs/exps/<first two digits of its parent>/<other digits>/<name>.
    listed = (git(root, "for-each-ref", "--format=%(objectname) %(refname)", "refs/exps/") or "").splitlines()
    pairs = [line.split(" ", 1) for line in listed]
    named = {commit for commit, ref in pairs if re.fullmatch(rf"refs/exps/../[^/]+/{re.escape(name)}", ref)}
    if len(named) > 1:
        raise UserError(f"{name}: {len(named)} experiments have this name; allowed: the commit of one of them")
    return named.pop() if named else None


def read(name: str, root: Path) -> State:
    """Read a state without changing the working folder.

    Raises
    ------
    UserError: there is no such revision, or it has no params.yaml or no metrics.
    """
    commit = resolve(name, root)
    if commit is None:
        raise UserError(f"{name}: no git revision, no DVC experiment and no folder; allowed: also {WORKSPACE!r}")
    folder = Paths().metrics("score").parent
    if not commit:
        params = (root / "params.yaml").read_text(encoding="utf-8") if (root / "params.yaml").is_file() else None
        metrics = {path.stem: read_json(path) for path in sorted((root / folder).glob("*.json"))}
        table = Paths(root).ablation / "nll.parquet"
        nll = read_table(table) if table.is_file() else None
    else:
        params = git(root, "show", f"{commit}:params.yaml")
        listed = (git(root, "ls-tree", "-r", "--name-only", commit, f"{folder}/") or "").splitlines()
        files = {Path(path).stem: git(root, "show", f"{commit}:{path}") for path in listed if path.endswith(".json")}
        metrics = {stem: json.loads(text) for stem, text in files.items() if text}
        nll = _from_dvc(root, commit, Paths().ablation / "nll.parquet")
    if params is None or not metrics:
        lack = "params.yaml" if params is None else "metrics/*.json (git tracks them: commit them after `dvc repro`)"
        raise UserError(f"{name}: it has no {lack}")
    if nll is None:
        log.warning("%s: DVC does not have its ablation table here, so the ablation has no intervals; `dvc pull`", name)
    try:
        content = YamlLoader(params).get_single_data()
    except yaml.YAMLError as error:
        raise UserError(f"{name}: params.yaml: not valid YAML: {' '.join(str(error).split())}") from None
    return State(name, commit, content, metrics, nll)


def _from_dvc(root: Path, commit: str, path: Path) -> pl.DataFrame | None:
    """A table that a commit's dvc.lock names, from DVC's cache or its remote; None if neither has it."""
    from dvc.api import DVCFileSystem
    from dvc.exceptions import DvcException
    from dvc_data.index import DataIndexDirError

    try:
        with DVCFileSystem(str(root), rev=commit).open(path.as_posix(), "rb") as file:
            return pl.read_parquet(file.read())
    except (OSError, DvcException, DataIndexDirError) as error:
        log.debug("%s at %s: %s", path, commit, error)
        return None
