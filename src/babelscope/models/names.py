"""Names of hookpoints; without torch, so that the report and the tracking can import it."""

import re

# The suffix that names the input of the hookpoint's module, which a transcoder encodes: `layers.14.mlp.input`.
INPUT = ".input"
_BLOCK = re.compile(r"(?:^|\.)(\d+)(?:\.(.+))?$")


def parts_of(hookpoint: str) -> tuple[int, str] | None:
    """The number of a hookpoint's block and the path inside the block ("" for the block itself), or None.

    The number is the first part of the path that is a number: `h2o.layers.3.mlp` is in block 3. If no part is, the
    result is None. `hookpoints.resolve` refuses names that do not match the model.
    """
    found = _BLOCK.search(hookpoint)
    return (int(found[1]), found[2] or "") if found else None


def layer_of(hookpoint: str) -> int:
    """The number of the block that contains `hookpoint` (0 if its path has no number)."""
    found = parts_of(hookpoint)
    return found[0] if found else 0


def input_name(hookpoint: str, transcode: bool) -> str:
    """The name of the activations that an SAE at `hookpoint` encodes; a transcoder encodes its module's input."""
    return hookpoint + INPUT if transcode else hookpoint
