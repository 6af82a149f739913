"""What stage `stream` leaves for `train` and `encode` to publish."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from babelscope.core.errors import UserError
from babelscope.core.files import read_json, write_atomically

OUT = Path("data/stream")
MODE = OUT / "mode.json"


def is_streaming() -> bool:
    """Whether the SAEs of the present params were trained by stage `stream`."""
    return MODE.is_file() and read_json(MODE)["source"] == "stream"


def publish(hookpoint: str, targets: Mapping[str, Path]) -> None:
    """Copy files of `data/stream/<hookpoint>/` by name to the paths that they have in every mode.

    Raises
    ------
    UserError: a file is not there.
    """
    for name, target in targets.items():
        source = OUT / hookpoint / name
        if not source.is_file():
            raise UserError(f"{source}: no such file; stage `stream` writes it: dvc repro stream")
        write_atomically(target, lambda path, source=source: shutil.copyfile(source, path))  # type: ignore[misc]
