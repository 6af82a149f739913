"""Stage `prune`: take away what hookpoints left behind that params.yaml no longer lists.

`score`, `ablate` and `report` depend on whole folders, since DVC cannot list a matrix's outputs in `deps`: a stale file
would make them run again. Its output is not cached, so that DVC runs it whenever the hookpoints change, also back.

Such a folder must be there even where params.yaml lists no hookpoint to write into it.
"""

import logging
import shutil
from pathlib import Path

from babelscope import config
from babelscope.core import stage
from babelscope.core.errors import UserError
from babelscope.core.files import write_json

LIST, AGAIN = Path("data/hookpoints.json"), Path("data/sae_again")
OURS = ("data", "metrics")
log = logging.getLogger(__name__)


def stale(lock: Path, hookpoints: list[str], retrained: list[str]) -> list[Path]:
    """The outputs in dvc.lock of stages such as `train@layers.14.mlp` whose hookpoint is not listed any more.

    Parameters
    ----------
    lock: dvc.lock.
    hookpoints: those of all stages but `retrain`.
    retrained: those of `retrain`.

    Raises
    ------
    UserError: one of them lies elsewhere than the stages write: dvc.lock may come from someone else.
    """
    stages = config.read_yaml(lock).get("stages", {}) if lock.is_file() else {}
    gone = []
    for name, entry in stages.items():
        base, at, hookpoint = name.partition("@")
        if at and hookpoint not in (retrained if base == "retrain" else hookpoints):
            gone.append(entry)
    paths = [Path(out["path"]) for entry in gone for out in entry.get("outs", [])]
    for path in paths:
        if path.is_absolute() or ".." in path.parts or len(path.parts) < 2 or path.parts[0] not in OURS:
            raise UserError(f"{lock}: {path} is no output of a hookpoint, and is not deleted; allowed: below {OURS}")
    return paths


def main() -> None:
    params = config.load()
    gone = [path for path in stale(Path("dvc.lock"), params.hookpoints, params.stability.hookpoints) if path.exists()]
    for path in gone:
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
    AGAIN.mkdir(parents=True, exist_ok=True)
    # Without those of `retrain`: what depends on this list does not depend on them.
    write_json(LIST, {"hookpoints": params.hookpoints})
    if gone:
        stage.table(["taken away"], [[path] for path in gone])
    else:
        log.info("prune: nothing to take away")


if __name__ == "__main__":
    stage.run(main)
