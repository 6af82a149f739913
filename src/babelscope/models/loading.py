"""Load a causal language model and its tokenizer from a file inside a package, a local folder, or a hub id.

transformers takes 15 s to read a GGUF file of 100 MB, mostly for names and vocabulary, and a pipeline run loads the
model a dozen times. Therefore a local GGUF file is unpacked once, to float32 safetensors in the Hugging Face cache.
"""

import importlib.metadata
import importlib.util
import logging
import os
import shutil
import struct
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from torch.overrides import TorchFunctionMode

from babelscope.config.schema import Model
from babelscope.config.values import expanded
from babelscope.core.errors import UserError, nearest
from babelscope.core.files import read_json
from babelscope.core.fingerprint import dvc_md5
from babelscope.models import packaged
from babelscope.models.hookpoints import resolve
from babelscope.models.probing import reads_ahead

log = logging.getLogger(__name__)

# Errors of transformers' loaders for a missing, damaged or unsupported file.
_FAILURES = (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError, struct.error,
             UnpicklingError, EOFError)  # fmt: skip

# GGUF files of more bytes are not unpacked, since unpacked files take up to eight times as much disk space.
_LARGEST = 2**28
_READERS = ("gguf", "transformers")

# Dtypes of models and of activations; activations to be stored in int8 are computed in float32.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.float32}


def _where(section: Model) -> tuple[str, dict[str, Any]]:
    """Arguments of `from_pretrained`: a folder or a hub id, and options such as the file and the revision."""
    options: dict[str, Any] = {"trust_remote_code": section.trust_remote_code}
    if section.gguf_file is not None:
        options["gguf_file"] = section.gguf_file
    if section.source == "package":
        folder = packaged.find(section.name, section.gguf_file)[0].parent
        return str(folder), options | {"local_files_only": True}
    if section.revision is not None:
        options["revision"] = section.revision
    folder = expanded(section.name)
    if not folder.is_dir():
        if section.name.startswith((".", "/", "~")):
            raise UserError(f"params.yaml: model.name: no folder {section.name!r}")
        return section.name, options
    if section.gguf_file is not None and not (folder / section.gguf_file).is_file():
        allowed = nearest(section.gguf_file, [path.name for path in folder.glob("*.gguf")])
        raise UserError(f"params.yaml: model.gguf_file: no file {section.gguf_file!r}; {allowed}")
    return str(folder), options | {"local_files_only": True}


def _source(section: Model) -> tuple[str, dict[str, Any]]:
    """Arguments of `from_pretrained`: those of `_where`, or the unpacked copy of a local GGUF file.

    The copy holds the same model and tokenizer, with float32 weights in safetensors. It is made once; its name contains
    the file's hash and the versions of the packages that read it.
    """
    source, options = _where(section)
    files = _gguf_files(section, source)
    if not files:
        if section.sha256 is not None:
            raise UserError(
                "params.yaml: model.sha256: it applies only to a local file model.gguf_file; allowed otherwise: null"
            )
        return source, options
    if len(files) == 1 and files[0].stat().st_size > _LARGEST:
        if section.sha256 is not None:
            packaged.check(files[0], section.sha256)
        return source, options
    from huggingface_hub import cached_assets_path

    content = section.sha256 or "-".join(map(dvc_md5, files))
    name = "-".join([content, *(f"{package}-{importlib.metadata.version(package)}" for package in _READERS)])
    advice = "set HF_HOME to a writable folder"
    try:
        folder = cached_assets_path("babelscope", "gguf") / name
        if not folder.is_dir() and not os.access(folder.parent, os.W_OK | os.X_OK):
            raise PermissionError(f"{folder.parent}: not writable")
    except OSError as error:  # such as a read-only or missing home folder
        if len(files) > 1:
            reason = f"cannot write the file joined from {len(files)} parts ({error})"
            raise UserError(f"{section.gguf_file}: {reason}; {advice}") from None
        log.warning("%s: slow at every load, since no copy can be written (%s); %s", section.gguf_file, error, advice)
        return source, options
    if not folder.is_dir():
        log.info("%s: unpacked once, to %s", section.gguf_file, folder)
        _unpack(files, section, options, folder)
    return str(folder), {key: value for key, value in options.items() if key != "gguf_file"}


def _gguf_files(section: Model, source: str) -> list[Path]:
    """The local GGUF file, or its parts in order; empty for other formats and for files on the hub."""
    if section.gguf_file is None:
        return []
    if section.source == "package":
        return packaged.find(section.name, section.gguf_file)
    file = Path(source) / section.gguf_file
    return [file] if file.is_file() else []


def _unpack(files: list[Path], section: Model, options: dict[str, Any], folder: Path) -> None:
    from safetensors.torch import save_model
    from transformers import AutoTokenizer, GgufConfig

    plain = {**options, "dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        source, joined = files[0].parent, temporary / str(section.gguf_file)
        if len(files) > 1:
            packaged.join(files, section.name, section.sha256, joined)
            source = temporary
        elif section.sha256 is not None:
            packaged.check(files[0], section.sha256)
        model = _read_weights(str(source), **plain)
        AutoTokenizer.from_pretrained(source, **options).save_pretrained(temporary)
        joined.unlink(missing_ok=True)
        model.config.save_pretrained(temporary)
        model.generation_config.save_pretrained(temporary)
        save_model(model, str(temporary / "model.safetensors"), metadata={"format": "pt"})
        if not folder.is_dir():  # else another process was faster
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _refusal(section: Model, what: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:300]
    if isinstance(error, UnpicklingError):  # torch's own message advises to run the code
        reason = "its .bin file is damaged, or holds pickled code, which is never run; allowed: weights in safetensors"
    elif "trust_remote_code" in str(error):
        reason = "it has Python code of its own, which runs only if model.trust_remote_code is true"
    return UserError(f"params.yaml: model.name: cannot load the {what} of {section.name!r}: {reason}")


def load_tokenizer(section: Model) -> Any:
    """The model's tokenizer (a `transformers` fast tokenizer).

    Raises
    ------
    UserError: the package, folder, file or hub id does not exist or holds no tokenizer.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        source, options = _source(section)
        if section.gguf_file is not None and "gguf_file" not in options:
            # For Gemma's 262,144 tokens, AutoTokenizer would take 2.5 s longer, since it parses them repeatedly.
            settings = read_json(Path(source) / "tokenizer_config.json")
            return PreTrainedTokenizerFast(tokenizer_file=f"{source}/tokenizer.json", **settings)
        return AutoTokenizer.from_pretrained(source, **options)
    except _FAILURES as error:
        raise _refusal(section, "tokenizer", error) from None


class _NoRandomWeights(TorchFunctionMode):
    """While open, nothing is drawn from a normal distribution.

    transformers draws weights that the file lacks. Those that are tied to others (an unembedding of 168 M numbers in
    Gemma 3 270M) are then replaced, and a model that lacks others is refused.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        if getattr(func, "__name__", "") != "normal_":
            return func(*args, **options)
        return args[0] if args else options["tensor"]  # torch.nn.init passes it by name


def _read_weights(source: str, **options: Any) -> Any:
    """Load the model, and check that all of its weights come from the file.

    transformers initialises weights that are missing or have another shape at random, and only reports it.

    Raises
    ------
    UserError: the file lacks a parameter of the model, or has it in another shape.
    """
    from transformers import AutoModelForCausalLM

    with _NoRandomWeights():
        model, report = AutoModelForCausalLM.from_pretrained(
            source, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    # Tied weights are not in the report. A missing buffer keeps the value that the model's code sets.
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    missing, unused = sorted(parameters & set(report["missing_keys"])), sorted(report["unexpected_keys"])
    mismatched = [f"{name} {list(found)} (the model's: {list(shape)})"
                  for name, found, shape in sorted(report["mismatched_keys"])]  # fmt: skip
    for names, what in ((missing, "the file lacks"), (mismatched, "the file has in another shape")):
        if names:
            others = f"; it holds tensors that the model does not have: {_first_of(unused)}" if unused else ""
            raise UserError(
                f"params.yaml: model.name: {source!r}: {what} {len(names)} of the {len(parameters)} weights of "
                f"{type(model).__name__}, which would stay random: {_first_of(names)}{others}; allowed: files with all "
                "weights under the names that transformers gives them (save_pretrained writes such files)"
            )
    if unused:
        kind = type(model).__name__
        log.warning("%s: %d tensors of the file are not part of %s: %s", source, len(unused), kind, _first_of(unused))
    return model


def _first_of(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def load_skeleton(section: Model) -> torch.nn.Module | None:
    """The model without weights (on the meta device), for checks before a long load; None for a GGUF file."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if section.gguf_file is not None:
        return None
    source, options = _where(section)
    try:
        config = AutoConfig.from_pretrained(source, **options)
        _check_decoder(section, config)
        with torch.device("meta"):
            options = {"trust_remote_code": section.trust_remote_code}
            model: torch.nn.Module = AutoModelForCausalLM.from_config(config, **options)
    except _FAILURES as error:
        raise _refusal(section, "configuration", error) from None
    return model


def check_hookpoints(section: Model, hookpoints: Sequence[str], key: str = "hookpoints") -> None:
    """Check before a long load that the model has these hookpoints of params.yaml; a GGUF file is not checked.

    Raises
    ------
    UserError: see `babelscope.models.hookpoints.resolve` and `load_model`.
    """
    skeleton = load_skeleton(section)
    if skeleton is not None:
        resolve(skeleton, hookpoints, key)


def _check_decoder(section: Model, config: Any) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"params.yaml: model.name: {section.name!r} is an encoder-decoder model ({config.model_type}), whose "
            "decoder predicts nothing without the encoder; allowed: causal (decoder-only) language models"
        )


def _has_bitsandbytes() -> bool:
    return importlib.util.find_spec("bitsandbytes") is not None


def _quantised(kind: str, dtype: torch.dtype) -> Any:
    """How transformers quantises the weights; computations with them run in `dtype`."""
    if not _has_bitsandbytes():
        raise UserError(
            f"params.yaml: model.quantization: {kind!r} needs the package bitsandbytes (pip install bitsandbytes); "
            "allowed without it: null"
        )
    from transformers import BitsAndBytesConfig

    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def load_model(section: Model, dtype: str) -> Any:
    """The causal language model in evaluation mode on the CPU, its parameters frozen.

    `dtype`: "float32", "bfloat16" or "float16", the precision of weights and forward pass.

    Raises
    ------
    UserError: the package, folder, file or hub id does not exist or holds no causal language model; the file lacks
        weights; or a token's output depends on later tokens (a masked language model).
    """
    from transformers import AutoConfig

    quantised = {}
    if section.quantization is not None:
        quantised["quantization_config"] = _quantised(section.quantization, DTYPES[dtype])
    try:
        source, options = _source(section)
        if "gguf_file" not in options:  # a GGUF file's configuration takes as long to read as its weights
            _check_decoder(section, AutoConfig.from_pretrained(source, **options))
        model = _read_weights(source, dtype=DTYPES[dtype], **options, **quantised)
    except _FAILURES as error:
        raise _refusal(section, "weights", error) from None
    model = model.eval().requires_grad_(False)
    if reads_ahead(model):
        raise UserError(
            f"params.yaml: model.name: {section.name!r} is no causal language model: the output of "
            f"{type(model).__name__} (with its config.json) at a token depends on later tokens, as in masked language "
            "models; allowed: models that predict each token from the tokens before it"
        )
    return model
