"""`babelscope export TARGET [HOOKPOINT ...]`: SAEs of `data/sae` in the format of EleutherAI/sparsify.

SAELens needs no export: `sae_lens.SAE.load_from_disk` reads `data/sae/<hookpoint>`.
"""

from pathlib import Path

from safetensors.torch import save_file

from babelscope import sae
from babelscope.core.errors import UserError, nearest
from babelscope.core.files import write_atomically, write_json
from babelscope.sae import SAE, formats

SAES = Path("data/sae")


def write_sparsify(dictionary: SAE, folder: Path) -> None:
    """Write `cfg.json` and `sae.safetensors` as `sparsify.SparseCoder.load_from_disk` reads them.

    Raises
    ------
    UserError: the SAE is not a TopK SAE, since sparsify has no thresholds.
    """
    if dictionary.k is None:
        raise UserError(f"{folder.name}: sparsify has no JumpReLU, BatchTopK or ReLU SAEs; allowed: TopK")
    b_enc = dictionary.b_enc.detach()
    if dictionary.b_in is not None:  # sparsify subtracts nothing from a transcoder's input
        b_enc = (b_enc.double() - formats.product(dictionary.encoder, dictionary.b_in)).float()
    weights = {
        "encoder.weight": dictionary.encoder, "encoder.bias": b_enc, "W_dec": dictionary.W_dec,
        "b_dec": dictionary.b_dec,
    }  # fmt: skip
    if dictionary.W_skip is not None:
        weights["W_skip"] = dictionary.W_skip
    config = {
        "activation": "topk", "d_in": dictionary.d_in, "expansion_factor": dictionary.latents // dictionary.d_in,
        "k": dictionary.k, "multi_topk": False, "normalize_decoder": False, "num_latents": dictionary.latents,
        "skip_connection": dictionary.W_skip is not None, "transcode": dictionary.b_in is not None,
    }  # fmt: skip
    content = {name: weight.detach().contiguous() for name, weight in weights.items()}
    write_atomically(folder / formats.SPARSIFY.weights, lambda path: save_file(content, path))
    write_json(folder / "cfg.json", config)


def main(target: Path, hookpoints: list[str]) -> None:
    """Write the SAEs of `hookpoints`, or of all in `data/sae`, to `<target>/<hookpoint>/`.

    Raises
    ------
    UserError: there are no SAEs, one of `hookpoints` has none, or sparsify's format cannot hold one.
    """
    have = sorted(path.name for path in SAES.glob("*") if path.is_dir())
    if not have:
        raise UserError(f"{SAES}: no SAEs; `dvc repro` trains them")
    for name in hookpoints or have:
        if name not in have:
            raise UserError(f"{SAES / name}: no such folder; {nearest(name, have)}")
        write_sparsify(sae.load(SAES, name), target / name)
