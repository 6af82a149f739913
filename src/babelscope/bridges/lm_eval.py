"""`--format lm-eval`: the vectors of stage `steer` as files for the model `steered` of lm-evaluation-harness.

`lm_eval --model steered --model_args pretrained=...,steer_path=FILE` runs any of its tasks on the changed model. A file
holds, by the path of a module below the model's body, what is done to its output at every position: here `add` the
vector times the coefficient.
"""

import io
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from babelscope.core import stage
from babelscope.core.errors import UserError
from babelscope.core.files import read_json, write_atomically
from babelscope.core.paths import Paths
from babelscope.models.names import module_of
from babelscope.steering import vectors

log = logging.getLogger(__name__)


def amplified(place: str, vector: Tensor, strength: float) -> dict[str, Any]:
    """What `steer` adds for a language, `x + strength v`; `vector` v is float32 `[d]`.

    `steer` also takes off the vector of the prompt's language, which is not known here.
    """
    return _file(place, vector, strength)


def removed(place: str, vector: Tensor) -> dict[str, Any]:
    """`x - v`: if `vector` v is DiffMean, the language's mean becomes that of the others; all methods have its length.

    The action `clamp` to 0 would move the other languages as well, whose mean along the vector is not 0.
    """
    return _file(place, vector, -1.0)


def _file(place: str, vector: Tensor, coefficient: float) -> dict[str, Any]:
    entry = {"steering_vector": vector.clone(), "steering_coefficient": coefficient, "action": "add"}
    return {place: entry | {"bias": None, "head_index": None}}


def save(content: dict[str, Any], path: Path) -> None:
    """Write with `torch.save`; through memory, because a name inside the file would be that of the temporary file."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, lambda temporary: temporary.write_bytes(buffer.getvalue()))


def main(target: Path, hookpoints: list[str]) -> None:
    """Write `<target>/<method>/<language>.amplified.pt` and `.removed.pt` of every vector that `steer` chose.

    Raises
    ------
    UserError: hookpoints are given, or `steer` has not run.
    """
    if hookpoints:
        raise UserError(
            "lm-eval: `steer` chooses the hookpoint of each vector; allowed: no hookpoints (steer.hookpoints)"
        )
    folder = Paths().vectors
    settings = read_json(folder / "settings.json")
    written = []
    for method, languages in settings.items():
        known = vectors.read(folder / f"{method}.safetensors")
        for language, chosen in languages.items():
            place = chosen["hookpoint"]
            if module_of(place)[1]:
                log.warning("%s: lm-eval cannot change the input of a module, so %s is left out", place, method)
                break
            vector = known[place][language]
            save(amplified(place, vector, chosen["strength"]), target / method / f"{language}.amplified.pt")
            save(removed(place, vector), target / method / f"{language}.removed.pt")
            written.append((method, language, place, chosen["strength"]))
    stage.table(["method", "language", "module", "strength"], written, labels=3)
