"""SAE files: written in SAELens' layout, read in SAELens' and in EleutherAI/sparsify's."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from babelscope.errors import UserError
from babelscope.files import read_json, write_atomically, write_json
from babelscope.sae.autoencoder import SAE

_SAELENS = "sae_weights.safetensors"
_SPARSIFY = "sae.safetensors"
# Without a version, SAELens takes a file for one from before its release 6, and drops the metadata.
_LAYOUT = "6.0.0"
# The activation function of each "architecture": SAELens' values, the first its default, and one of ours, the last.
_ACTIVATIONS = {
    "standard": "relu",
    "topk": "topk",
    "jumprelu": "jumprelu",
    "transcoder": "relu",
    "jumprelu_transcoder": "jumprelu",
    "topk_transcoder": "topk",
}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def save(sae: SAE, folder: Path, metadata: Mapping[str, Any]) -> None:
    """Write `cfg.json` and `sae_weights.safetensors` in SAELens' layout; the same weights give the same bytes.

    SAELens loads all of them (`SAE.load_from_disk`) but for one: it has no TopK transcoder. Where the widths d_in and d
    agree, a TopK transcoder is written as a `topk` that leaves `b_dec` out of the input, which SAELens computes alike;
    where they differ, as `topk_transcoder`, a name of ours. What makes a transcoder in the files is the key `d_out`.

    SAELens takes nothing off a transcoder's input: `b_in` is folded into `b_enc` (`b_enc - W_enc^T b_in`, in float64),
    and is 0 when loaded.

    Parameters
    ----------
    sae: in the units of the raw activations (any input normalisation folded into the weights).
    folder: made where missing.
    metadata: what SAELens keeps beside the weights, at least `model_name` and `hook_name`.
    """
    names = ("encoder", "b_enc", "W_dec", "b_dec", "threshold")
    weights = {name: getattr(sae, name).detach().cpu() for name in names if getattr(sae, name) is not None}
    architecture = _architecture(sae)
    config: dict[str, Any] = {
        "architecture": architecture,
        "d_in": sae.d_in,
        "d_sae": sae.latents,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": sae.b_in is None,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": _LAYOUT, **metadata},
    }
    if sae.k is not None:
        config |= {"k": sae.k, "rescale_acts_by_decoder_norm": False}
    if sae.b_in is not None:
        config["d_out"] = sae.d
        weights["b_enc"] = (weights["b_enc"] - _product(weights["encoder"], sae.b_in.cpu())).float()
    if architecture in ("standard", "transcoder"):
        del weights["threshold"]
    weights["W_enc"] = weights.pop("encoder").T.contiguous()
    write_atomically(folder / _SAELENS, lambda path: save_file(weights, path))
    write_json(folder / "cfg.json", config)


def _architecture(sae: SAE) -> str:
    transcoder = sae.b_in is not None
    if sae.threshold is None:
        return "topk_transcoder" if transcoder and sae.d != sae.d_in else "topk"
    if bool(sae.threshold.any()):
        return "jumprelu_transcoder" if transcoder else "jumprelu"
    return "transcoder" if transcoder else "standard"


def _product(encoder: Tensor, b: Tensor) -> Tensor:
    """`encoder @ b` in float64, a few rows at a time: a copy of all weights in float64 would be large."""
    parts = (encoder[first : first + 4096] for first in range(0, len(encoder), 4096))
    return torch.cat([rows.double() @ b.double() for rows in parts])


def load(path_or_repo: str | Path, hookpoint: str | None = None, *, revision: str | None = None) -> SAE:
    """Load an SAE from a local folder, or from the Hugging Face hub where no such folder exists.

    Parameters
    ----------
    path_or_repo: the folder of one SAE, a folder with one folder per hookpoint, or a hub id (`owner/name`) of such.
    hookpoint: e.g. `layers.14.mlp`; looked for as `<path>/<hookpoint>/` first, then `<path>` itself.
    revision: of a hub repository (a commit hash pins it).

    Raises
    ------
    UserError: a file is missing or corrupt, or holds a kind of SAE that `SAE` cannot compute (SAELens' gated ones,
        say, or skip connections).
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
    architecture = _one_of(config, "architecture", tuple(_ACTIVATIONS))
    activation = _ACTIVATIONS[architecture]
    for key in ("normalize_activations", "reshape_activations"):
        _one_of(config, key, ("none",))
    for key in ("activation_fn", "activation_fn_str"):  # before release 6
        _one_of(config, key, ("topk" if activation == "topk" else "relu",))
    _one_of(config, "finetuning_scaling_factor", (False,))

    encoder, W_dec, b_enc, b_dec = (tensors[name].float() for name in ("W_enc", "W_dec", "b_enc", "b_dec"))
    encoder, b_in = encoder.mT, None
    if architecture.endswith("transcoder") or "d_out" in config:
        _one_of(config, "apply_b_dec_to_input", (False,))
        b_in = torch.zeros(encoder.shape[1])
    elif not _one_of(config, "apply_b_dec_to_input", (True, False)):
        b_enc = (b_enc + _product(encoder, b_dec)).float()  # an autoencoder of ours takes b_dec off its input

    if activation == "topk":
        if _one_of(config, "rescale_acts_by_decoder_norm", (False, True)):
            norms = W_dec.norm(dim=1)
            encoder, b_enc = encoder * norms[:, None], b_enc * norms
            W_dec = W_dec / norms.clamp(min=torch.finfo(torch.float32).tiny)[:, None]  # a latent of norm 0 stays at 0
        return SAE(encoder, W_dec, b_enc, b_dec, _k(config), b_in=b_in)
    # Below a threshold under 0, SAELens' ReLU is what holds negative scores back: as a threshold of 0 does.
    threshold = tensors["threshold"].float().clamp(min=0) if activation == "jumprelu" else torch.zeros_like(b_enc)
    return SAE(encoder, W_dec, b_enc, b_dec, threshold=threshold, b_in=b_in)


def _from_sparsify(config: dict[str, Any], tensors: dict[str, Tensor]) -> SAE:
    _one_of(config, "activation", ("topk",))
    for key in ("skip_connection", "signed"):  # signed: early releases, the largest scores of either sign
        _one_of(config, key, (False,))
    names = ("encoder.weight", "W_dec", "encoder.bias", "b_dec")
    encoder, W_dec, b_enc, b_dec = (tensors[name] for name in names)
    transcoder = _one_of(config, "transcode", (False, True))  # whose input is encoded as it is
    return SAE(encoder, W_dec, b_enc, b_dec, _k(config), b_in=torch.zeros(encoder.shape[1]) if transcoder else None)


def _one_of(config: dict[str, Any], key: str, allowed: tuple[Any, ...]) -> Any:
    """The value of a setting that changes what the weights mean; the first of those allowed where it is missing."""
    found = config.get(key)
    if found is None:
        return allowed[0]
    if found not in allowed:
        raise ValueError(f"cfg.json: {key} is {found!r}; allowed: {', '.join(map(repr, allowed))}")
    return found


def _k(config: dict[str, Any]) -> int:
    k = config["k"]
    if type(k) is not int:  # True is an int, too
        raise ValueError(f"cfg.json: k is {k!r}; allowed: a whole number")
    return k
