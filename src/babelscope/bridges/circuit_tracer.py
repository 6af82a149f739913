"""`--format circuit-tracer`: transcoders of `data/sae` as a set that circuit-tracer attributes through.

circuit-tracer (Ameisen et al. 2025, "Circuit Tracing") replaces the MLP of every block by a transcoder. A set is a
folder with `config.yaml` and `layer_<n>.safetensors` for every block n from 0.
"""

from pathlib import Path

import torch
import yaml

from babelscope import config, sae
from babelscope.bridges.dictionaries import chosen, encoder_bias, save
from babelscope.config.values import local_name
from babelscope.core.errors import UserError
from babelscope.core.files import write_atomically
from babelscope.core.paths import Paths
from babelscope.models.names import parts_of
from babelscope.sae import SAE

# By the path of a hookpoint inside its block: the names that TransformerLens gives to where the transcoder writes. Both
# read the input of the MLP.
_OUTPUTS = {"mlp": "mlp.hook_out", "post_feedforward_layernorm": "hook_mlp_out"}


def write(dictionary: SAE, path: Path) -> None:
    """Write one transcoder; `k` is a tensor without dimensions, as circuit-tracer writes it."""
    weights = {
        "W_enc": dictionary.encoder, "W_dec": dictionary.W_dec, "b_enc": encoder_bias(dictionary),
        "b_dec": dictionary.b_dec, "W_skip": dictionary.W_skip,
    }  # fmt: skip
    if dictionary.k is not None:
        weights["k"] = torch.tensor(dictionary.k)
    elif dictionary.threshold is not None and bool(dictionary.threshold.any()):
        weights["activation_function.threshold"] = dictionary.threshold
    save(weights, path)


def main(target: Path, hookpoints: list[str]) -> None:
    """Write the transcoders of `hookpoints`, or of all in `data/sae`, and the settings of the set.

    Raises
    ------
    UserError: the hookpoints are not the MLPs of all blocks from 0 on, or an SAE is no transcoder with d_in = d.
    """
    names = chosen(hookpoints)
    places = [parts_of(name) or (0, "") for name in names]
    blocks, kinds = sorted(block for block, _ in places), {inside for _, inside in places}
    if len(kinds) > 1 or not kinds <= _OUTPUTS.keys() or blocks != list(range(len(blocks))):
        raise UserError(
            f"hookpoints: circuit-tracer wants one transcoder of every block from 0 on, of the MLP "
            f"({' or '.join(f'layers.N.{kind}' for kind in _OUTPUTS)}); these are: {', '.join(names)}"
        )
    activation: dict[str, str] = {}
    for name, (block, _) in zip(names, places, strict=True):
        dictionary = sae.load(Paths().saes, name)
        if dictionary.b_in is None or dictionary.d_in != dictionary.d:
            raise UserError(f"{name}: no transcoder with d_in = d; circuit-tracer needs `train.transcode: true`")
        write(dictionary, target / f"layer_{block}.safetensors")
        activation = {"activation": "topk"} if dictionary.k is not None else {}
    settings = {
        "model_kind": "transcoder_set", "model_name": local_name(config.load().model.name),
        "feature_input_hook": "mlp.hook_in", "feature_output_hook": _OUTPUTS[kinds.pop()],
    } | activation  # fmt: skip
    write_atomically(target / "config.yaml", lambda path: path.write_text(yaml.safe_dump(settings, sort_keys=False)))
