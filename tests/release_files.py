"""Files of released SAEs with random weights, in the layouts of their makers."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

D, N = 16, 64


def weights() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    shapes = {"encoder.weight": (N, D), "decoder.weight": (D, N), "encoder.bias": (N,), "decoder.bias": (D,)}
    found = {name: torch.randn(*shape, generator=draw) for name, shape in shapes.items()}
    found["decoder.weight"] /= found["decoder.weight"].norm(dim=0)  # as those released: of unit norm
    return found


def by_saelens_names(d_in: int = D) -> dict[str, torch.Tensor]:
    """The weights by SAELens' names, `W_enc` `[d_in, n]`, with another random encoder if d_in is not D."""
    w = weights()
    W_enc = w["encoder.weight"].T if d_in == D else torch.randn(d_in, N, generator=torch.Generator().manual_seed(4))
    return {"W_enc": W_enc, "W_dec": w["decoder.weight"].T, "b_enc": w["encoder.bias"], "b_dec": w["decoder.bias"]}


def write_gemma_scope(folder: Path, **changes: Any) -> None:
    arrays = by_saelens_names() | {"threshold": torch.linspace(-0.5, 3, N)}
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **({name: value.numpy() for name, value in arrays.items()} | changes))


def write_gemma_scope_2(folder: Path, d: int = D, **settings: Any) -> None:
    """With `config.json` if there are settings: the hub has it for some of the SAEs only."""
    w = {name.lower(): value for name, value in by_saelens_names(d).items()} | {"threshold": torch.linspace(-0.5, 3, N)}
    if d != D:
        w |= {"w_dec": w["w_enc"].T.clone(), "b_dec": w["b_enc"][:d].clone()}
    if "affine" in folder.name:
        w["affine_skip_connection"] = torch.randn(d, d, generator=torch.Generator().manual_seed(5))
    folder.mkdir(parents=True)
    save_file({name: value.contiguous() for name, value in w.items()}, folder / "params.safetensors")
    if settings:
        (folder / "config.json").write_text(json.dumps({"architecture": "jump_relu", **settings}))


def write_qwen_scope(file: Path) -> None:
    file.parent.mkdir(parents=True)
    w = by_saelens_names()
    torch.save(w | {"W_enc": w["W_enc"].T.clone(), "W_dec": w["W_dec"].T.clone()}, file)


def write_linear(file: Path, suffix: str) -> None:
    """As Goodfire (`encoder_linear`) and qresearch (`encoder`) publish them."""
    file.parent.mkdir(parents=True)
    torch.save({name.replace(".", f"{suffix}."): value for name, value in weights().items()}, file)


def write_traced(file: Path, more: Sequence[str] = ()) -> None:
    """As circuit-tracer writes transcoders: both weights are `[n, d]`."""
    draw, w = torch.Generator().manual_seed(6), by_saelens_names()
    w["W_enc"] = w["W_enc"].T
    extra = {
        "W_skip": torch.randn(D, D, generator=draw),
        "activation_function.threshold": torch.rand(N, generator=draw),
    }
    file.parent.mkdir(parents=True)
    save_file({name: value.contiguous() for name, value in (w | {key: extra[key] for key in more}).items()}, file)


def write_llama_scope(folder: Path, **changes: Any) -> None:
    settings = {
        "act_fn": "jumprelu", "d_model": D, "d_sae": N, "jump_relu_threshold": 0.4, "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": 6.25, "out": 6.25}, "use_decoder_bias": True,
        "apply_decoder_bias_to_pre_encoder": False, "sparsity_include_decoder_norm": True,
        "hook_point_in": "blocks.3.hook_resid_post", "hook_point_out": "blocks.3.hook_resid_post",
    }  # fmt: skip
    (folder / "checkpoints").mkdir(parents=True)
    save_file({name: value.contiguous() for name, value in weights().items()}, folder / "checkpoints/final.safetensors")
    (folder / "hyperparams.json").write_text(json.dumps(settings | changes))


def write_dictionary(folder: Path, kind: str, **changes: Any) -> None:
    w, trainer = weights(), {"dict_class": kind, "activation_dim": D, "dict_size": N}
    tensors = {"b_dec": w.pop("decoder.bias"), **w, "k": torch.tensor(4), "threshold": torch.tensor(1.5)}
    if kind == "MatryoshkaBatchTopKSAE":
        tensors |= {"W_enc": w["encoder.weight"].T, "W_dec": w["decoder.weight"].T, "b_enc": w["encoder.bias"]}
    folder.mkdir(parents=True)
    torch.save(tensors | changes, folder / "ae.pt")
    (folder / "config.json").write_text(json.dumps({"trainer": trainer}))


def write_saelens(folder: Path, **changes: Any) -> None:
    folder.mkdir(parents=True)
    tensors = {name: value.contiguous() for name, value in by_saelens_names().items()}
    save_file(tensors, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"d_in": D, "d_sae": N, **changes}))


def write_sparsify(folder: Path, **changes: Any) -> None:
    w = weights()
    tensors = {"encoder.weight": w["encoder.weight"], "encoder.bias": w["encoder.bias"], "b_dec": w["decoder.bias"],
               "W_dec": w["decoder.weight"].T.contiguous()}  # fmt: skip
    folder.mkdir(parents=True)
    save_file(tensors, folder / "sae.safetensors")
    settings = {"d_in": D, "k": 4, "num_latents": 0, "expansion_factor": N // D}
    (folder / "cfg.json").write_text(json.dumps(settings | changes))
