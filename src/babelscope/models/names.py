"""Names of hookpoints; without torch, so that the report and the tracking can import it."""

import re

# The suffix of a hookpoint that means the input of the module instead of its output: `layers.14.self_attn.o_proj.input`
INPUT = ".input"
# The suffix that names what a transcoder at the hookpoint encodes: `layers.14.mlp/input`, see `module_of`.
_ENCODED = "/input"
# The module whose output is an MLP's write to the residual stream in Gemma 2 and 3, and the MLP.
_NORM, _MLP = ".post_feedforward_layernorm", ".mlp"
_BLOCK = re.compile(r"(?:^|\.)(\d+)(?:\.(.+))?$")


def parts_of(hookpoint: str) -> tuple[int, str] | None:
    """The number of a hookpoint's block and the path inside the block ("" for the block itself), or None.

    The number is the first part of the path that is a number: `h2o.layers.3.mlp` is in block 3. If no part is, the
    result is None. `hookpoints.resolve` refuses names that do not match the model.
    """
    found = _BLOCK.search(hookpoint.removesuffix(_ENCODED))
    return (int(found[1]), found[2] or "") if found else None


def layer_of(hookpoint: str) -> int:
    """The number of the block that contains `hookpoint` (0 if its path has no number)."""
    found = parts_of(hookpoint)
    return found[0] if found else 0


def input_name(hookpoint: str, transcode: bool) -> str:
    """The name of the activations that an SAE at `hookpoint` encodes; a transcoder encodes its module's input."""
    return hookpoint + _ENCODED if transcode else hookpoint


def module_of(name: str) -> tuple[str, bool]:
    """The path of the module whose activations a hookpoint or an `input_name` names, and whether its input is meant.

    A transcoder at `post_feedforward_layernorm` (Gemma Scope) encodes the input of the block's MLP, not the norm's.
    """
    if name.endswith(_ENCODED):
        path = name.removesuffix(_ENCODED)
        return (path.removesuffix(_NORM) + _MLP if path.endswith(_NORM) else path), True
    return name.removesuffix(INPUT), name.endswith(INPUT)
