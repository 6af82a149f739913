"""Stage `prune`: take away what hookpoints left behind that params.yaml no longer lists.

`score`, `ablate` and `report` depend on whole folders, since DVC cannot list a matrix's outputs in `deps`: a stale file
would make them run again. Its output is not cached, so that DVC runs it whenever the hookpoints change, also back.
"""

import shutil
from pathlib import Path

from babelscope import config, stage
from babelscope.files import write_json

LIST = Path("data/hookpoints.json")


def stale(lock: Path, hookpoints: list[str]) -> list[Path]:
    """The outputs in dvc.lock of stages such as `train@layers.14.mlp` whose hookpoint is not among `hookpoints`."""
    stages = config.read_yaml(lock).get("stages", {}) if lock.is_file() else {}
    gone = [entry for name, entry in stages.items() if "@" in name and name.split("@", 1)[1] not in hookpoints]
    return [Path(out["path"]) for entry in gone for out in entry.get("outs", [])]


def main() -> None:
    params = config.load()
    for path in stale(Path("dvc.lock"), params.hookpoints):
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
    write_json(LIST, {"hookpoints": params.hookpoints})


if __name__ == "__main__":
    stage.run(main)
