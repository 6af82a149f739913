"""SAE files: written in SAELens' layout, and read in any of `formats` from a folder or the hub."""

import re
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from babelscope.config.values import expanded
from babelscope.core.errors import UserError
from babelscope.core.files import read_json, write_atomically, write_json
from babelscope.sae import directory, formats
from babelscope.sae.autoencoder import SAE

# SAELens treats a file without a version as older than its release 6, and drops the metadata.
_LAYOUT = "6.0.0"
# How many parts of a path tell settings (`Format.by_name`): in Gemma Scope, the repository and three folders.
_NAMES = 4
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def save(sae: SAE, folder: Path, metadata: Mapping[str, Any]) -> None:
    """Write `cfg.json` and `sae_weights.safetensors` in SAELens' layout; the same weights give the same bytes.

    SAELens loads them (`SAE.load_from_disk`), except TopK transcoders with d_in != d, which it does not have: they are
    written as `topk_transcoder`, our own name (`topk_skip_transcoder` with a skip connection). A TopK transcoder with
    d_in = d is written as a `topk` SAE that does not subtract `b_dec` from the input, which computes the same. The key
    `d_out` marks a transcoder.

    SAELens subtracts nothing from a transcoder's input, so `b_in` is folded into `b_enc` (`b_enc - W_enc^T b_in`, in
    float64) and is 0 when loaded.

    Parameters
    ----------
    sae: an SAE in the units of the raw activations (any input normalisation is folded into the weights).
    metadata: entries that SAELens keeps with the weights, at least `model_name` and `hook_name`.
    """
    names = ("encoder", "b_enc", "W_dec", "b_dec", "threshold", "W_skip")
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
        weights["b_enc"] = (weights["b_enc"] - formats.product(weights["encoder"], sae.b_in.cpu())).float()
    if architecture in ("standard", "transcoder", "skip_transcoder"):
        del weights["threshold"]
    weights["W_enc"] = weights.pop("encoder").T.contiguous()
    write_atomically(folder / formats.SAELENS.weights, lambda path: save_file(weights, path))
    write_json(folder / "cfg.json", config)


def _architecture(sae: SAE) -> str:
    transcoder = "" if sae.b_in is None else "transcoder" if sae.W_skip is None else "skip_transcoder"
    if sae.threshold is None:
        is_plain = sae.d == sae.d_in and sae.W_skip is None
        return "topk" if is_plain else f"topk_{transcoder}"
    if bool(sae.threshold.any()):
        return "_".join(filter(None, ("jumprelu", transcoder)))
    return transcoder or "standard"


def load(path_or_repo: str | Path, hookpoint: str | None = None, *, revision: str | None = None) -> SAE:
    """Load an SAE from a local folder, or from the Hugging Face hub if no such folder exists.

    The names of the files tell the format (see `formats`). Pickled code is never run.

    Parameters
    ----------
    path_or_repo: the folder or file of one SAE, a folder with one of them per hookpoint, a hub id (`owner/name`), or an
        entry of SAELens' directory (`sae-lens:<release>`, see `directory`).
    hookpoint: e.g. `layers.14.mlp`, or the folder or file of an SAE below `path_or_repo`, or its id in the directory.
        `<path>/<hookpoint>` is tried first, then `<path>` itself.
    revision: revision of a hub repository (a commit hash pins it).

    Raises
    ------
    UserError: a file is missing or corrupt, or holds an SAE that `SAE` cannot compute (e.g. a gated SAE).
    """
    if str(path_or_repo).startswith(directory.PREFIX):
        path_or_repo, hookpoint = directory.resolve(str(path_or_repo), hookpoint)
    root = expanded(path_or_repo)
    if not root.exists():
        root = _download(str(path_or_repo), hookpoint, revision)
    name = "/".join(Path(path_or_repo, hookpoint or "").parts[-_NAMES:])
    places = [root / hookpoint, root] if hookpoint else [root]
    for place in places:
        for kind in formats.FORMATS:
            if place.is_file() and "*" in kind.weights and fnmatch(place.name, kind.weights):
                return _read(place.parent, kind, place.name, name)
            if (place / kind.weights).is_file():
                return _read(place, kind, kind.weights, name)
    tried = ", ".join(kind.weights for kind in formats.FORMATS)
    raise UserError(f"{' or '.join(map(str, places))}: no SAE here; expected one of: {tried}")


def _download(repo: str, hookpoint: str | None, revision: str | None) -> Path:
    # "data/sae" has the form of a hub id; if the folder "data" exists, a local path is meant.
    if not _HUB_ID.fullmatch(repo) or Path(repo).parts[0] in (".", "..") or Path(repo).parent.exists():
        raise UserError(f"{repo}: no such folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    files = [name for kind in formats.FORMATS for name in (kind.settings, kind.weights) if name]
    names = [name for name in files if "*" not in name]
    patterns = [f"{hookpoint}/{name}" for name in names] + [hookpoint, *names] if hookpoint else names
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{repo}: no such folder, and the Hugging Face hub does not give it: {reason:.300}") from None


def _read(folder: Path, kind: formats.Format, file: str, name: str) -> SAE:
    weights, settings = folder / file, {}
    if kind.settings and ((folder / kind.settings).is_file() or kind.needs_settings):
        settings = read_json(folder / kind.settings)
    try:
        tensors = kind.read(weights)
    except Exception as error:  # a damaged file makes the readers raise errors of many types
        reason = " ".join(str(error).split())
        raise UserError(f"{weights}: not a readable file of {kind.name}: {reason:.300}") from None
    try:
        return kind.build(settings | kind.by_name(name), tensors)
    except KeyError as error:
        lack = f"neither {kind.settings} nor {file} holds" if kind.settings else f"{file} lacks"
        names = ", ".join(sorted(tensors)[:6])
        raise UserError(f"{folder}: {lack} the key {error}; its tensors: {names}") from None
    except (ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise UserError(f"{folder / (kind.settings or file)}: {error}") from None
