"""`--format sparsify`: SAEs of `data/sae` in the format of EleutherAI/sparsify.

SAELens needs no export: `sae_lens.SAE.load_from_disk` reads `data/sae/<hookpoint>`.
"""

from pathlib import Path

from babelscope import sae
from babelscope.bridges.dictionaries import chosen, encoder_bias, save
from babelscope.core.errors import UserError
from babelscope.core.files import write_json
from babelscope.core.paths import Paths
from babelscope.sae import SAE, formats


def write(dictionary: SAE, folder: Path) -> None:
    """Write `cfg.json` and `sae.safetensors` as `sparsify.SparseCoder.load_from_disk` reads them.

    Raises
    ------
    UserError: the SAE is not a TopK SAE, since sparsify has no thresholds.
    """
    if dictionary.k is None:
        raise UserError(f"{folder.name}: sparsify has no JumpReLU, BatchTopK or ReLU SAEs; allowed: TopK")
    weights = {
        "encoder.weight": dictionary.encoder, "encoder.bias": encoder_bias(dictionary), "W_dec": dictionary.W_dec,
        "b_dec": dictionary.b_dec, "W_skip": dictionary.W_skip,
    }  # fmt: skip
    config = {
        "activation": "topk", "d_in": dictionary.d_in, "expansion_factor": dictionary.latents // dictionary.d_in,
        "k": dictionary.k, "multi_topk": False, "normalize_decoder": False, "num_latents": dictionary.latents,
        "skip_connection": dictionary.W_skip is not None, "transcode": dictionary.b_in is not None,
    }  # fmt: skip
    save(weights, folder / formats.SPARSIFY.weights)
    write_json(folder / "cfg.json", config)


def main(target: Path, hookpoints: list[str]) -> None:
    """Write the SAEs of `hookpoints`, or of all in `data/sae`, to `<target>/<hookpoint>/`.

    Raises
    ------
    UserError: there are no SAEs, one of `hookpoints` has none, or sparsify's format cannot hold one.
    """
    for name in chosen(hookpoints):
        write(sae.load(Paths().saes, name), target / name)
