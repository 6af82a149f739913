"""SAE files: written in SAELens' layout, read in SAELens' and in EleutherAI/sparsify's."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from babelscope.errors import UserError
from babelscope.files import read_json, write_atomically, write_json
from babelscope.sae.autoencoder import SAE

_SAELENS = "sae_weights.safetensors"
_SPARSIFY = "sae.safetensors"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def save(sae: SAE, folder: Path, metadata: Mapping[str, Any]) -> None:
    """Write `cfg.json` and `sae_weights.safetensors` in SAELens' layout; the same weights give the same bytes.

    Parameters
    ----------
    sae: in the units of the raw activations (any input normalisation folded into the weights).
    folder: made where missing.
    metadata: what SAELens keeps beside the weights, at least `model_name` and `hook_name`.
    """
    weights = {"W_enc": sae.W_enc, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    tensors = {name: weight.detach().cpu().float().contiguous() for name, weight in weights.items()}
    config = {
        "architecture": "topk",
        "d_in": sae.d,
        "d_sae": sae.latents,
        "k": sae.k,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": False,
        "metadata": dict(metadata),
    }
    write_atomically(folder / _SAELENS, lambda path: path.write_bytes(to_bytes(tensors)))
    write_json(folder / "cfg.json", config)


def load(path_or_repo: str | Path, hookpoint: str | None = None, *, revision: str | None = None) -> SAE:
    """Load an SAE from a local folder, or from the Hugging Face hub where no such folder exists.

    Parameters
    ----------
    path_or_repo: the folder of one SAE, a folder with one folder per hookpoint, or a hub id (`owner/name`) of such.
    hookpoint: e.g. `layers.14.mlp`; looked for as `<path>/<hookpoint>/` first, then `<path>` itself.
    revision: of a hub repository (a commit hash pins it).

    Raises
    ------
    UserError: a file is missing or corrupt, or holds a kind of SAE other than TopK.
    """
    root = Path(path_or_repo)
    if not root.exists():
        root = _download(str(path_or_repo), hookpoint, revision)
    folders = [root / hookpoint, root] if hookpoint else [root]
    for folder in folders:
        for name, read in ((_SAELENS, _from_saelens), (_SPARSIFY, _from_sparsify)):
            if (folder / name).is_file():
                return _read(folder / "cfg.json", folder / name, read)
    tried = " or ".join(str(folder / name) for folder in folders for name in (_SAELENS, _SPARSIFY))
    raise UserError(f"{root}: no SAE here; expected {tried}")


def _download(repo: str, hookpoint: str | None, revision: str | None) -> Path:
    # "data/sae" has the form of a hub id: with a folder "data" at hand, a local path is meant.
    if not _HUB_ID.fullmatch(repo) or Path(repo).parts[0] in (".", "..") or Path(repo).parent.exists():
        raise UserError(f"{repo}: no such folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    names = ["cfg.json", _SAELENS, _SPARSIFY]
    patterns = [f"{hookpoint}/{name}" for name in names] + names if hookpoint else names
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{repo}: no such folder, and not to be had from the Hugging Face hub: {reason:.300}") from None


def _read(config: Path, weights: Path, read: Callable[[dict[str, Any], dict[str, Tensor]], SAE]) -> SAE:
    try:
        settings = read_json(config)
    except FileNotFoundError:
        raise UserError(f"{config}: no such file; it belongs beside {weights.name}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{config}: not valid JSON: {error}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{config}: expected a JSON object, got {type(settings).__name__}")
    try:
        tensors = load_file(weights)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{weights}: not a readable safetensors file: {error}") from None
    try:
        return read(settings, tensors)
    except KeyError as error:
        raise UserError(f"{weights.parent}: neither cfg.json nor {weights.name} holds the key {error}") from None
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"{weights.parent}: {error}") from None


def _from_saelens(config: dict[str, Any], tensors: dict[str, Tensor]) -> SAE:
    _expect(config, "architecture", "topk")
    for key in ("normalize_activations", "reshape_activations"):
        _expect(config, key, "none")
    encoder, W_dec = tensors["W_enc"].float().T, tensors["W_dec"].float()
    b_enc, b_dec = tensors["b_enc"].float(), tensors["b_dec"].float()
    if not config.get("apply_b_dec_to_input", True):
        b_enc = b_enc + encoder @ b_dec  # our encoder takes b_dec off its input
    if config.get("rescale_acts_by_decoder_norm", False):
        norms = W_dec.norm(dim=1)
        encoder, b_enc, W_dec = encoder * norms[:, None], b_enc * norms, W_dec / norms[:, None]
    return SAE(encoder, W_dec, b_enc, b_dec, int(config["k"]))


def _from_sparsify(config: dict[str, Any], tensors: dict[str, Tensor]) -> SAE:
    _expect(config, "activation", "topk")
    for key in ("transcode", "skip_connection"):
        _expect(config, key, False)
    names = ("encoder.weight", "W_dec", "encoder.bias", "b_dec")
    encoder, W_dec, b_enc, b_dec = (tensors[name] for name in names)
    return SAE(encoder, W_dec, b_enc, b_dec, int(config["k"]))


def _expect(config: dict[str, Any], key: str, allowed: Any) -> None:
    """Refuse a setting that would change what the weights mean; a missing key is the default."""
    found = config.get(key, allowed)
    if found is not None and found != allowed:
        raise ValueError(f"cfg.json: {key} is {found!r}; allowed: {allowed!r}")
