"""Loading a causal language model and its tokenizer: a file inside a package, a local folder, or a hub id.

transformers takes 15 s to read a GGUF file of 100 MB, most of it for names and vocabulary, and a pipeline run loads the
model a dozen times. So what it makes of a local one is kept as safetensors, among the assets of the Hugging Face cache.
"""

import importlib.metadata
import importlib.util
import logging
import os
import shutil
import struct
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError

from babelscope.errors import UserError, nearest
from babelscope.fingerprint import dvc_md5
from babelscope.sections import Model

log = logging.getLogger(__name__)

# What the loaders of transformers raise for a missing, damaged or foreign file.
_FAILURES = (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError, struct.error,
             UnpicklingError, EOFError)  # fmt: skip

# Larger GGUF files (bytes) are read anew every time: unpacked they take up to eight times as much room on the disk.
_LARGEST = 2**28
_READERS = ("gguf", "transformers")

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


def _unpacked(place: str, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """What to load in place of a local GGUF file: the same model and tokenizer, weights in float32, as safetensors.

    It is made where it is not there yet, under the hash of the file and the versions of what reads it.
    """
    file = Path(place) / options.get("gguf_file", "")
    if not file.is_file() or file.stat().st_size > _LARGEST:
        return place, options
    from huggingface_hub import cached_assets_path

    name = "-".join([dvc_md5(file), *(f"{package}-{importlib.metadata.version(package)}" for package in _READERS)])
    rest = {key: value for key, value in options.items() if key != "gguf_file"}
    try:
        folder = cached_assets_path("babelscope", "gguf") / name
        if not folder.is_dir() and not os.access(folder.parent, os.W_OK | os.X_OK):
            raise PermissionError(f"{folder.parent}: cannot be written")
    except OSError as error:  # the home folder is read-only or missing, say
        log.warning(
            "%s: read slowly every time, since nothing can be kept (%s); set HF_HOME to a folder that can be written",
            file.name, error,
        )  # fmt: skip
        return place, options
    if not folder.is_dir():
        log.info("%s: unpacked once, to %s", file.name, folder)
        _unpack(place, options, folder)
    return str(folder), rest


def _unpack(place: str, options: dict[str, Any], folder: Path) -> None:
    from safetensors.torch import save_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    plain = {**options, "dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(place, **plain)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        AutoTokenizer.from_pretrained(place, **options).save_pretrained(temporary)
        model.config.save_pretrained(temporary)
        model.generation_config.save_pretrained(temporary)
        save_model(model, str(temporary / "model.safetensors"), metadata={"format": "pt"})
        if not folder.is_dir():  # another process may have been faster
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def name_of(section: Model) -> str:
    """What outputs call the model: its package, hub id, or the last part of its folder, which is the same elsewhere."""
    folder = Path(section.name).expanduser()
    return folder.resolve().name if folder.is_dir() else section.name


def _refusal(section: Model, what: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:300]
    if isinstance(error, UnpicklingError):  # torch's own words recommend to run it all the same
        reason = "its .bin file is damaged, or holds pickled code, which is never run; allowed: weights in safetensors"
    elif "trust_remote_code" in str(error):
        reason = "it comes with Python code of its own, which is run only where model.trust_remote_code is true"
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
        place, options = _unpacked(place, options)
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
    quantised = (
        {} if section.quantization is None else {"quantization_config": _quantised(section.quantization, DTYPES[dtype])}
    )
    try:
        place, options = _unpacked(place, options)
        model = AutoModelForCausalLM.from_pretrained(place, dtype=DTYPES[dtype], **options, **quantised)
    except _FAILURES as error:
        raise _refusal(section, "weights", error) from None
    return model.eval().requires_grad_(False)
