"""Stage `prune`: delete the outputs of hookpoints that params.yaml no longer lists.

`score` and others depend on whole folders, since DVC cannot list the outputs of a matrix in `deps`. Outputs of removed
hookpoints would change the hashes of these folders, so that DVC's run cache would have no entry for them when the list
changes back to an earlier one. The output of this stage is not cached: DVC runs it at every change of the list.
"""

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

from babelscope import config
from babelscope.core import stage
from babelscope.core.errors import UserError
from babelscope.core.files import write_json
from babelscope.core.paths import Paths

log = logging.getLogger(__name__)


def stale(
    lock: Path, hookpoints: Sequence[str], retrained: Sequence[str], dictionaries: Sequence[str] = ()
) -> list[Path]:
    """The outputs in dvc.lock of stages such as `train@layers.14.mlp` whose hookpoint is no longer listed.

    Parameters
    ----------
    lock: dvc.lock.
    hookpoints: those of all stages but `retrain`.
    retrained: the items of `retrain`, `<hookpoint>-<seed>`.
    dictionaries: the names of stage `dictionary`.

    Raises
    ------
    UserError: an output is not below data/ or metrics/: dvc.lock may come from someone else.
    """
    found, listed = [], {"retrain": retrained, "dictionary": dictionaries}
    for name, entry in (config.read_yaml(lock).get("stages", {}) if lock.is_file() else {}).items():
        base, separator, item = name.partition("@")
        if separator and item not in listed.get(base, hookpoints):
            found += [Path(out["path"]) for out in entry.get("outs", [])]
    for path in found:
        if path.is_absolute() or ".." in path.parts or len(path.parts) < 2 or path.parts[0] not in ("data", "metrics"):
            raise UserError(
                f"{lock}: {path} is not below data/ or metrics/ and is not deleted; run `git checkout {lock.name}`"
            )
    return found


def run(params: config.Config, paths: Paths) -> None:
    """Delete what is stale; write the list of hookpoints, on which the stages that read folders depend."""
    retrained = [f"{name}-{seed}" for name in params.stability.hookpoints for seed in params.stability.seeds]
    found = stale(paths.root / "dvc.lock", params.hookpoints, retrained, params.baselines.dictionaries)
    existing = [path for path in found if (paths.root / path).exists()]
    for path in existing:
        if (paths.root / path).is_dir():
            shutil.rmtree(paths.root / path)
        else:
            (paths.root / path).unlink()
    # Stages depend on these folders, which must exist even if no SAE is retrained.
    paths.saes_again.mkdir(parents=True, exist_ok=True)
    paths.dictionaries.mkdir(parents=True, exist_ok=True)
    # Without the hookpoints of `retrain`: stages that depend on this file do not use them.
    write_json(paths.hookpoints, {"hookpoints": params.hookpoints})
    if existing:
        stage.table(["deleted"], [[path] for path in existing])
    else:
        log.info("prune: nothing to delete")
