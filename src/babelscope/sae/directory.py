"""SAELens' directory of released SAEs, `pretrained_saes.yaml` in its package: which file of which repository has an id.

Only that file is read; the package is not imported, so `pip install --no-deps sae-lens` is enough.
"""

import functools
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from babelscope.core.errors import UserError, nearest

PREFIX = "sae-lens:"
# SAELens' reader of a release (`conversion_func`; None: its own format), and the format's name in docs/pretrained.md.
FORMATS = {
    None: "SAELens",
    "gemma_2": "Gemma Scope",
    "gemma_2_transcoder": "Gemma Scope, transcoders",
    "gemma_3": "Gemma Scope 2",
    "llama_scope": "Llama Scope",
    "qwen_scope": "Qwen-Scope",
    "mwhanna_transcoder": "circuit-tracer",
    "dictionary_learning_1": "dictionary_learning",
    "goodfire": "Goodfire",
    "deepseek_r1": "Goodfire",
    "sparsify": "EleutherAI/sparsify",
    "llama_scope_r1_distill": "Llama Scope R1",
    "connor_rob_hook_z": "GPT-2 attention (hook_z)",
    "mntss_clt_layer_transcoder": "circuit-tracer, cross-layer",
    "temporal": "temporal SAEs",
}
_UNREAD = {
    "llama_scope_r1_distill": "its thresholds are stored in another layout than Llama Scope's",
    "connor_rob_hook_z": "its settings have a layout of their own",
    "mntss_clt_layer_transcoder": "one layer of a cross-layer transcoder reconstructs no layer",
    "temporal": "its latents depend on other tokens",
}
# The directory does not say which dictionaries are gated, nor which SAEs divide the input by the token's own norm
# (OpenAI's, "v5"); their files do.
_BY_NAME = {"_gated_": "gated SAEs", "-v5-": "the input is normalised by token (layer_norm)"}


@functools.cache
def read(path: Path | None = None) -> dict[str, dict[str, Any]]:
    """The releases by name; `path`: the file, by default that of the installed package.

    Raises
    ------
    UserError: the package is not installed.
    """
    if path is None:
        package = find_spec("sae_lens")
        if package is None or not package.submodule_search_locations:
            raise UserError(
                f"params.yaml: pretrained.name: {PREFIX}... is looked up in the package sae-lens, which is not "
                "installed; pip install --no-deps sae-lens"
            )
        path = Path(package.submodule_search_locations[0]) / "pretrained_saes.yaml"
    # The C loader reads the 44,000 lines in a second, PyYAML's own in ten.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    content: dict[str, dict[str, Any]] = loader(path.read_text()).get_single_data()
    return content


def obstacle(release: str, about: dict[str, Any], sae: dict[str, Any]) -> str | None:
    """Why an SAE of a release cannot be loaded, as far as its entry in the directory tells; None if it can."""
    reader = about.get("conversion_func")
    if reader not in FORMATS or reader in _UNREAD:
        return _UNREAD.get(str(reader), f"a format that is not known here, {reader!r}")
    if reader is None and (
        "norm_scaling_factor" in sae or "normalize_activations" in (about.get("config_overrides") or {})
    ):
        return "the input is normalised by a factor that its files do not hold"
    if reader == "gemma_2" and str(sae["path"]).startswith("embedding"):
        return "an SAE of the token embeddings, which lie outside the blocks"
    return next((reason for part, reason in _BY_NAME.items() if part in release), None)


def resolve(name: str, sae_id: str | None = None) -> tuple[str, str]:
    """The repository, and the folder or file in it, of `sae-lens:<release>` and an id, or of `sae-lens:<release>/<id>`.

    Raises
    ------
    UserError: the directory has no such release or id, or the SAE cannot be loaded.
    """
    releases = read()
    release, _, own_id = name.removeprefix(PREFIX).partition("/")
    if release not in releases:
        raise UserError(f"{name}: SAELens' directory has no release {release!r}; {nearest(release, releases)}")
    about, wanted = releases[release], own_id or sae_id or ""
    ids = {str(sae["id"]): sae for sae in about["saes"]}
    if wanted not in ids:
        raise UserError(f"{name}: the release has no SAE {wanted!r}; {nearest(wanted, ids)}")
    if reason := obstacle(release, about, ids[wanted]):
        raise UserError(f"{name}: {wanted!r} cannot be loaded: {reason}")
    return about["repo_id"], str(ids[wanted]["path"])
