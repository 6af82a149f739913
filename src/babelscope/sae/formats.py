"""The formats in which SAEs are released: how each is recognised, read, and turned into an `SAE`.

Every `SAE` takes activations as the model computes them and returns latents in the units of the release: the input
normalisation of a release is folded into the weights.
"""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from babelscope.sae.autoencoder import SAE

Settings = dict[str, Any]
Tensors = Mapping[str, Tensor]

# The activation function of each "architecture" in SAELens, its default first; the last two architectures are our own.
ACTIVATIONS = {
    "standard": "relu",
    "topk": "topk",
    "jumprelu": "jumprelu",
    "transcoder": "relu",
    "skip_transcoder": "relu",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
    "topk_transcoder": "topk",
    "topk_skip_transcoder": "topk",
}


class Format(NamedTuple):
    """A file format for an SAE: a folder, or one of many files in a folder.

    Attributes
    ----------
    name: library or release that uses it.
    settings: the JSON file next to the weights; None if there is none.
    weights: the file of the weights; a pattern with `*` if each file in a folder is an SAE.
    read: returns the tensors in that file by name, and never executes its content.
    build: returns the SAE for settings and tensors; raises ValueError if `SAE` cannot compute it.
    needs_settings: whether an SAE without the file of settings is incomplete.
    by_name: further settings, which only the names of the repository and the folders tell.
    """

    name: str
    settings: str | None
    weights: str
    read: Callable[[Path], Tensors]
    build: Callable[[Settings, Tensors], SAE]
    needs_settings: bool = True
    by_name: Callable[[str], Settings] = lambda name: {}


def product(encoder: Tensor, b: Tensor) -> Tensor:
    """`encoder @ b` in float64, in chunks of rows, since a float64 copy of all weights would be large."""
    parts = (encoder[first : first + 4096] for first in range(0, len(encoder), 4096))
    return torch.cat([rows.double() @ b.double() for rows in parts])


def _one_of(config: Settings, key: str, allowed: tuple[Any, ...]) -> Any:
    """The value of a setting that the meaning of the weights depends on; the first of `allowed` if it is missing."""
    found = config.get(key)
    if found is None:
        return allowed[0]
    if found not in allowed:
        raise ValueError(f"{key} is {found!r}; allowed: {', '.join(map(repr, allowed))}")
    return found


def _whole(config: Settings, key: str) -> int:
    value = config[key]
    if type(value) is not int:  # isinstance would accept True
        raise ValueError(f"{key} is {value!r}; allowed: a whole number")
    return value


def _number(value: Any, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise ValueError(f"{key} is {value!r}; allowed: a number above 0")
    return float(value)


def _check_sizes(config: Settings, **sizes: int) -> None:
    """Check that settings for the sizes of the weights, if they are present, agree with the weights."""
    for key, size in sizes.items():
        if isinstance(config.get(key), int) and config[key] not in (size, 0):  # sparsify derives a size of 0
            raise ValueError(f"{key} is {config[key]}, but the weights have {size}: they do not belong together")


def _unscaled(tensors: Tensors) -> None:
    if not bool((tensors.get("scaling_factor", torch.ones(1)) == 1).all()):
        raise ValueError("scaling_factor is not 1; allowed: files without it")


def _uncentred(encoder: Tensor, b_enc: Tensor, b_dec: Tensor) -> Tensor:
    """Convert the bias of an encoder that subtracts nothing from its input: our autoencoders subtract b_dec."""
    return (b_enc.double() + product(encoder, b_dec)).float()


def _saelens(config: Settings, tensors: Tensors) -> SAE:
    architecture = _one_of(config, "architecture", tuple(ACTIVATIONS))
    activation = ACTIVATIONS[architecture]
    for key in ("normalize_activations", "reshape_activations"):
        _one_of(config, key, ("none", False))
    old = config.get("activation_fn_kwargs") or {}  # before release 6, `standard` had several activation functions
    for key in ("activation_fn", "activation_fn_str"):
        if architecture == "standard" and "k" in old and config.get(key) == "topk":
            activation = "topk"
        _one_of(config, key, ("topk" if activation == "topk" else "relu",))
    _one_of(config, "finetuning_scaling_factor", (False,))
    _unscaled(tensors)

    encoder, W_dec, b_enc, b_dec = (tensors[name].float() for name in ("W_enc", "W_dec", "b_enc", "b_dec"))
    encoder, b_in = encoder.mT, None
    skip = tensors["W_skip"] if "skip" in architecture else None
    _check_sizes(config, d_in=encoder.shape[1], d_sae=encoder.shape[0], d_out=W_dec.shape[1])
    if architecture.endswith("transcoder") or "d_out" in config:
        _one_of(config, "apply_b_dec_to_input", (False,))
        b_in = torch.zeros(encoder.shape[1])
    elif not _one_of(config, "apply_b_dec_to_input", (True, False)):
        b_enc = _uncentred(encoder, b_enc, b_dec)

    if activation == "topk":
        if _one_of(config, "rescale_acts_by_decoder_norm", (False, True)):
            norms = W_dec.norm(dim=1)
            encoder, b_enc = encoder * norms[:, None], b_enc * norms
            W_dec = W_dec / norms.clamp(min=torch.finfo(torch.float32).tiny)[:, None]  # a latent of norm 0 stays at 0
        return SAE(encoder, W_dec, b_enc, b_dec, _whole(old | config, "k"), b_in=b_in, W_skip=skip)
    # If a threshold is negative, SAELens' ReLU still drops negative scores, as a threshold of 0 does.
    threshold = tensors["threshold"].float().clamp(min=0) if activation == "jumprelu" else torch.zeros_like(b_enc)
    return SAE(encoder, W_dec, b_enc, b_dec, threshold=threshold, b_in=b_in, W_skip=skip)


def _sparsify(config: Settings, tensors: Tensors) -> SAE:
    _one_of(config, "activation", ("topk",))
    _one_of(config, "signed", (False,))  # in early releases: the largest scores of either sign
    if _one_of(config, "skip_connection", (False, True)) != ("W_skip" in tensors):
        raise ValueError("skip_connection is true without W_skip in the weights, or the other way round")
    names = ("encoder.weight", "W_dec", "encoder.bias", "b_dec")
    encoder, W_dec, b_enc, b_dec = (tensors[name] for name in names)
    _check_sizes(config, d_in=encoder.shape[1], num_latents=encoder.shape[0])
    transcoder = _one_of(config, "transcode", (False, True))  # a transcoder subtracts nothing from its input
    b_in = torch.zeros(encoder.shape[1]) if transcoder else None
    return SAE(encoder, W_dec, b_enc, b_dec, _whole(config, "k"), b_in=b_in, W_skip=tensors.get("W_skip"))


def _gemma_scope(config: Settings, tensors: Tensors) -> SAE:
    """Gemma Scope (Lieberum et al. 2024, arXiv 2408.05147): `relu(x W_enc + b_enc)` above a threshold per latent.

    Gemma Scope 2 writes the names of the weights in lower case. Its transcoders may have an affine skip connection,
    stored as `[d_in, d]`.
    """
    _unscaled(tensors)
    _one_of(config, "architecture", ("jump_relu",))
    w = "w" if "w_enc" in tensors else "W"
    W_enc, W_dec, b_enc, b_dec, threshold = (
        tensors[name].float() for name in (f"{w}_enc", f"{w}_dec", "b_enc", "b_dec", "threshold")
    )
    encoder, threshold = W_enc.mT, threshold.clamp(min=0)
    if config["is_transcoder"] or config.get("hf_hook_point_out") is not None:
        skip = tensors["affine_skip_connection"].mT if "affine_skip_connection" in tensors else None
        return SAE(encoder, W_dec, b_enc, b_dec, threshold=threshold, b_in=torch.zeros(len(W_enc)), W_skip=skip)
    return SAE(encoder, W_dec, _uncentred(encoder, b_enc, b_dec), b_dec, threshold=threshold)


def _gemma_scope_name(name: str) -> Settings:
    if "embedding" in name:
        raise ValueError("an SAE of the token embeddings; allowed: SAEs of the blocks")
    return {"is_transcoder": "transcoder" in name}


def _qwen_scope(config: Settings, tensors: Tensors) -> SAE:
    """Qwen-Scope (arXiv 2605.11887): the k largest of `relu(x W_enc^T + b_enc)`."""
    encoder, W_dec, b_enc, b_dec = (tensors[name].float() for name in ("W_enc", "W_dec", "b_enc", "b_dec"))
    return SAE(encoder, W_dec.mT, _uncentred(encoder, b_enc, b_dec), b_dec, config["k"])


def _qwen_scope_name(name: str) -> Settings:
    found = re.search(r"L0_(\d+)", name)
    if found is None:
        raise ValueError("the name of its folder does not tell k; keep the repository's name, which ends in L0_<k>")
    return {"k": int(found[1])}


def _linear(_config: Settings, tensors: Tensors) -> SAE:
    """Goodfire's and qresearch's SAEs: `relu(x W_enc + b_enc)`, weights of torch.nn.Linear."""
    names = ("encoder_linear", "decoder_linear") if "encoder_linear.weight" in tensors else ("encoder", "decoder")
    encoder, decoder, b_enc, b_dec = (tensors[f"{n}.{kind}"].float() for kind in ("weight", "bias") for n in names)
    b_enc = _uncentred(encoder, b_enc, b_dec)
    return SAE(encoder, decoder.mT, b_enc, b_dec, threshold=torch.zeros_like(b_enc))


def _circuit_tracer(_config: Settings, tensors: Tensors) -> SAE:
    """The transcoders of circuit-tracer (ReLU, JumpReLU or TopK), with or without a skip connection `[d, d]`."""
    encoder, W_dec, b_enc, b_dec = (tensors[name].float() for name in ("W_enc", "W_dec", "b_enc", "b_dec"))
    b_in, skip = torch.zeros(encoder.shape[1]), tensors.get("W_skip")
    if "k" in tensors:
        return SAE(encoder, W_dec, b_enc, b_dec, int(tensors["k"]), b_in=b_in, W_skip=skip)
    threshold = tensors.get("activation_function.threshold", torch.zeros_like(b_enc)).float().clamp(min=0)
    return SAE(encoder, W_dec, b_enc, b_dec, threshold=threshold, b_in=b_in, W_skip=skip)


def _llama_scope(config: Settings, tensors: Tensors) -> SAE:
    """Llama Scope (He et al. 2024, arXiv 2410.20526), from OpenMOSS' Language-Model-SAEs.

    Input and output are normalised "dataset-wise": `x sqrt(d) / (mean norm)`. `jump_relu_threshold` is in the units of
    the raw activations, since their library, in its state "inference", folds the normalisation into the weights and
    divides the decoder rows by their norms before it applies the threshold (`standardize_parameters_of_dataset_norm`,
    `transform_to_unit_decoder_norm`). So with `sparsity_include_decoder_norm`, the threshold holds for a latent's score
    times the norm of its decoder row in units of the raw output, else for its score on the raw input. SAELens scales
    the threshold by the norm of the input only, which is the same if decoder rows have norm 1 and the mean input and
    output norms are equal.
    """
    _one_of(config, "act_fn", ("jumprelu",))
    _one_of(config, "apply_decoder_bias_to_pre_encoder", (False,))
    encoder, decoder, b_enc = (tensors[name].float() for name in ("encoder.weight", "decoder.weight", "encoder.bias"))
    d = encoder.shape[1]
    _check_sizes(config, d_model=d, d_sae=encoder.shape[0])
    b_dec = tensors["decoder.bias"].float() if _one_of(config, "use_decoder_bias", (True, False)) else torch.zeros(d)
    into, out = 1.0, 1.0
    if _one_of(config, "norm_activation", ("dataset-wise", "inference")) == "dataset-wise":
        norms = config["dataset_average_activation_norm"]
        into, out = (
            math.sqrt(d) / _number(norms[key], f"dataset_average_activation_norm.{key}") for key in ("in", "out")
        )
    raw = torch.full_like(b_enc, _number(config["jump_relu_threshold"], "jump_relu_threshold"))
    is_of_output = _one_of(config, "sparsity_include_decoder_norm", (True, False))
    threshold = raw * out / decoder.norm(dim=0) if is_of_output else raw * into
    encoder, W_dec, b_dec = encoder * into, decoder.mT / out, b_dec / out
    if config["hook_point_in"] != config["hook_point_out"]:
        return SAE(encoder, W_dec, b_enc, b_dec, threshold=threshold, b_in=torch.zeros(d))
    return SAE(encoder, W_dec, _uncentred(encoder, b_enc, b_dec), b_dec, threshold=threshold)


def _dictionary_learning(config: Settings, tensors: Tensors) -> SAE:
    """The dictionaries of saprmarks/dictionary_learning, except the gated ones."""
    trainer = config["trainer"]
    kind = trainer["dict_class"]
    if kind in ("JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE"):  # [d, n]
        encoder, W_dec = tensors["W_enc"].float().mT, tensors["W_dec"].float()
        b_enc, b_dec = tensors["b_enc"].float(), tensors["b_dec"].float()
    elif kind in ("AutoEncoder", "AutoEncoderTopK", "BatchTopKSAE"):  # torch.nn.Linear
        encoder, W_dec = tensors["encoder.weight"].float(), tensors["decoder.weight"].float().mT
        b_enc, b_dec = tensors["encoder.bias"].float(), tensors["bias" if kind == "AutoEncoder" else "b_dec"].float()
    else:
        raise ValueError(
            f"trainer.dict_class is {kind!r}; allowed: AutoEncoder, AutoEncoderTopK, BatchTopKSAE, "
            "JumpReluAutoEncoder, MatryoshkaBatchTopKSAE"
        )
    _check_sizes(trainer, activation_dim=encoder.shape[1], dict_size=encoder.shape[0])
    if kind == "AutoEncoderTopK":
        return SAE(encoder, W_dec, b_enc, b_dec, int(tensors["k"]))
    if kind == "AutoEncoder":
        return SAE(encoder, W_dec, b_enc, b_dec, threshold=torch.zeros_like(b_enc))
    if kind == "JumpReluAutoEncoder":  # subtracts nothing from its input
        b_enc = _uncentred(encoder, b_enc, b_dec)
    elif bool((tensors["threshold"] < 0).any()):  # it is -1 until training sets it: every positive score would fire
        raise ValueError(
            f"the threshold of {kind} was never set; allowed: files trained past trainer.threshold_start_step"
        )
    threshold = tensors["threshold"].float().clamp(min=0).expand(b_enc.shape)
    return SAE(encoder, W_dec, b_enc, b_dec, threshold=threshold)


def _safetensors(path: Path) -> Tensors:
    """Read every tensor through a memory mapping of its own, which is freed when the tensor is copied and dropped."""
    with safe_open(path, framework="pt") as handle:
        names = list(handle.keys())
    tensors = {}
    for name in names:
        with safe_open(path, framework="pt") as handle:
            tensors[name] = handle.get_tensor(name)
    return tensors


def _npz(path: Path) -> Tensors:
    import numpy as np

    with np.load(path, allow_pickle=False) as archive:
        return {name: torch.from_numpy(archive[name]) for name in archive.files}


def _torch(path: Path) -> Tensors:
    tensors: Tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ValueError("it holds values that are not tensors by name")
    return tensors


SAELENS = Format("SAELens", "cfg.json", "sae_weights.safetensors", _safetensors, _saelens)
SPARSIFY = Format("EleutherAI/sparsify", "cfg.json", "sae.safetensors", _safetensors, _sparsify)
GEMMA_SCOPE = Format("Gemma Scope", None, "params.npz", _npz, _gemma_scope, by_name=_gemma_scope_name)
GEMMA_SCOPE_2 = Format(
    "Gemma Scope 2", "config.json", "params.safetensors", _safetensors, _gemma_scope, False, _gemma_scope_name
)
LLAMA_SCOPE = Format("Llama Scope", "hyperparams.json", "checkpoints/final.safetensors", _safetensors, _llama_scope)
DICTIONARY_LEARNING = Format("dictionary_learning", "config.json", "ae.pt", _torch, _dictionary_learning)
QWEN_SCOPE = Format("Qwen-Scope", None, "*.sae.pt", _torch, _qwen_scope, by_name=_qwen_scope_name)
GOODFIRE = Format("Goodfire", None, "*.pt*", _torch, _linear)
CIRCUIT_TRACER = Format("circuit-tracer", None, "*.safetensors", _safetensors, _circuit_tracer)
# The first that matches is taken.
FORMATS = (
    SAELENS, SPARSIFY, GEMMA_SCOPE, GEMMA_SCOPE_2, LLAMA_SCOPE, DICTIONARY_LEARNING, QWEN_SCOPE, GOODFIRE,
    CIRCUIT_TRACER,
)  # fmt: skip
