"""Loading a causal language model and its tokenizer: a file inside a package, a local folder, or a hub id."""

import importlib.metadata
import importlib.util
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from babelscope.config import Model
from babelscope.errors import UserError, nearest

log = logging.getLogger(__name__)

# What the loaders of transformers raise for a missing, damaged or foreign file.
_FAILURES = (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError)

# Of models and of activations; those that are to be stored in int8 are read in float32.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.float32}


def _package_folder(package: str, file: str | None) -> Path:
    """The folder that holds `file` (or config.json) inside an installed package."""
    try:
        files = importlib.metadata.distribution(package).files or []
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            f"params.yaml: model.name: no installed package {package!r}; install it, or set model.source to "
            "'huggingface' for a folder or a hub id"
        ) from None
    wanted = file or "config.json"
    for entry in files:
        if entry.name == wanted:
            return Path(str(entry.locate())).parent
    have = [entry.name for entry in files if entry.suffix == (".gguf" if file else ".json")]
    raise UserError(f"params.yaml: model.gguf_file: package {package!r} holds no {wanted!r}; {nearest(wanted, have)}")


def _where(section: Model) -> tuple[str, dict[str, Any]]:
    """What `from_pretrained` is given: a folder or a hub id, and the options that say which file and revision."""
    options: dict[str, Any] = {"trust_remote_code": section.trust_remote_code}
    if section.gguf_file is not None:
        options["gguf_file"] = section.gguf_file
    if section.source == "package":
        place = str(_package_folder(section.name, section.gguf_file))
    else:
        place = section.name
        if section.revision is not None:
            options["revision"] = section.revision
        if place.startswith((".", "/", "~")) and not Path(place).expanduser().is_dir():
            raise UserError(f"params.yaml: model.name: no folder {place!r}")
    if Path(place).expanduser().is_dir():
        place = str(Path(place).expanduser())
        options["local_files_only"] = True
        if section.gguf_file is not None and not (Path(place) / section.gguf_file).is_file():
            have = [p.name for p in Path(place).glob("*.gguf")]
            raise UserError(f"params.yaml: model.gguf_file: {nearest(section.gguf_file, have)}")
    return place, options


def name_of(section: Model) -> str:
    """What outputs call the model: its package, hub id, or the last part of its folder, which is the same elsewhere."""
    folder = Path(section.name).expanduser()
    return folder.resolve().name if folder.is_dir() else section.name


def _refusal(section: Model, what: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:300]
    return UserError(f"params.yaml: model.name: cannot load the {what} of {section.name!r}: {reason}")


def load_tokenizer(section: Model) -> Any:
    """The model's tokenizer (a `transformers` fast tokenizer).

    Raises
    ------
    UserError: the package, folder, file or hub id does not exist or holds no tokenizer.
    """
    from transformers import AutoTokenizer

    place, options = _where(section)
    try:
        return AutoTokenizer.from_pretrained(place, **options)
    except _FAILURES as error:
        raise _refusal(section, "tokenizer", error) from None


def load_skeleton(section: Model) -> torch.nn.Module | None:
    """The model without weights (on the meta device), to check names before a long load; null for a GGUF file."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if section.gguf_file is not None:
        return None
    place, options = _where(section)
    try:
        config = AutoConfig.from_pretrained(place, **options)
        with torch.device("meta"):
            model: torch.nn.Module = AutoModelForCausalLM.from_config(
                config, trust_remote_code=section.trust_remote_code
            )
    except _FAILURES as error:
        raise _refusal(section, "configuration", error) from None
    return model


def _has_bitsandbytes() -> bool:
    return importlib.util.find_spec("bitsandbytes") is not None


def _quantised(kind: str, dtype: torch.dtype) -> Any:
    """How transformers is to quantise the weights; what is computed with them is computed in `dtype`."""
    if not _has_bitsandbytes():
        raise UserError(
            f"params.yaml: model.quantization: {kind!r} needs the package bitsandbytes (pip install bitsandbytes); "
            "without it: null"
        )
    from transformers import BitsAndBytesConfig

    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def load_model(section: Model, dtype: str) -> Any:
    """The causal language model in evaluation mode on the CPU, its parameters frozen.

    Parameters
    ----------
    section: which model.
    dtype: "float32", "bfloat16" or "float16": the precision of weights and forward pass.

    Raises
    ------
    UserError: the package, folder, file or hub id does not exist or holds no causal language model.
    """
    from transformers import AutoModelForCausalLM

    place, options = _where(section)
    if section.quantization is not None:
        options["quantization_config"] = _quantised(section.quantization, DTYPES[dtype])
    try:
        model = AutoModelForCausalLM.from_pretrained(place, dtype=DTYPES[dtype], **options)
    except _FAILURES as error:
        raise _refusal(section, "weights", error) from None
    return model.eval().requires_grad_(False)
