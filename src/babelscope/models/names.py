"""What the name of a hookpoint says. Needs no torch, so that the report and the tracking can read it."""

import re

# The suffix of a name for what enters the hookpoint's module, which a transcoder encodes: `layers.14.mlp.input`.
INPUT = ".input"
_BLOCK = re.compile(r"(?:^|\.)(\d+)(?:\.(.+))?$")


def parts_of(hookpoint: str) -> tuple[int, str] | None:
    """The block that a hookpoint lies in and the path inside of it ("" for the block itself).

    The number of the block is the first part of the path that is a number: `h2o.layers.3.mlp` lies in block 3. None if
    there is none. `hookpoints.resolve` refuses names for which the model says otherwise.
    """
    found = _BLOCK.search(hookpoint)
    return (int(found[1]), found[2] or "") if found else None


def layer_of(hookpoint: str) -> int:
    """The number of the block that `hookpoint` lies in (0 if its path holds no number)."""
    found = parts_of(hookpoint)
    return found[0] if found else 0


def input_name(hookpoint: str, transcode: bool) -> str:
    """The name of the activations that an SAE at `hookpoint` encodes; a transcoder encodes its module's input."""
    return hookpoint + INPUT if transcode else hookpoint
