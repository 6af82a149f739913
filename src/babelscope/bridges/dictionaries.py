"""The SAEs of data/sae for exporters that write weights."""

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from babelscope.core.errors import UserError, nearest
from babelscope.core.files import write_atomically
from babelscope.core.paths import Paths
from babelscope.sae import SAE, formats


def chosen(hookpoints: list[str]) -> list[str]:
    """`hookpoints`, or all that have an SAE in `data/sae`.

    Raises
    ------
    UserError: there are no SAEs, or one of `hookpoints` has none.
    """
    saes = Paths().saes
    have = sorted(path.name for path in saes.glob("*") if path.is_dir())
    if not have:
        raise UserError(f"{saes}: no SAEs; `dvc repro` trains them")
    for name in hookpoints:
        if name not in have:
            raise UserError(f"{saes / name}: no such folder; {nearest(name, have)}")
    return hookpoints or have


def save(weights: Mapping[str, Tensor | None], path: Path) -> None:
    """Write the weights that there are as a safetensors file, atomically."""
    content = {name: weight.detach().contiguous() for name, weight in weights.items() if weight is not None}
    write_atomically(path, lambda temporary: save_file(content, temporary))


def encoder_bias(dictionary: SAE) -> Tensor:
    """`b_enc` for tools that subtract nothing from a transcoder's input: `b_enc - W_enc^T b_in`, float32 [n]."""
    b_enc = dictionary.b_enc.detach()
    if dictionary.b_in is None:
        return b_enc
    return (b_enc.double() - formats.product(dictionary.encoder, dictionary.b_in)).float()
