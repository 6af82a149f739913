"""Stage `dictionary <name>`: one of `baselines.dictionaries`, which show what training and the model contribute.

`frozen_decoder`, `frozen_encoder`: an SAE whose decoder, or encoder, stays as initialised (arXiv 2602.14111).
`random_model`: an SAE on the activations of the model with random weights. `neurons`: the activations of the MLP's
neurons, without an SAE.
"""

import copy
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from babelscope.activations import extraction, store
from babelscope.config import Config
from babelscope.config.values import local_name
from babelscope.core.errors import UserError
from babelscope.core.files import move, read_table
from babelscope.core.paths import Paths
from babelscope.core.resume import is_first_rank, kept
from babelscope.models import forward, loading, tokens
from babelscope.models import hookpoints as hooks
from babelscope.models.names import layer_of
from babelscope.models.processes import together
from babelscope.sae.training import rerun
from babelscope.sae.training.stored import StoredActivations

log = logging.getLogger(__name__)

KEY = "baselines.dictionaries"
# The path of an activation function (act, act_fn, activation_fn, gelu_impl) inside a block, but not in its attention.
_ACTIVATION = re.compile(r"^(?!.*att).*?\b(?:act|gelu)\w*$")


def run(params: Config, paths: Paths, name: str) -> None:
    """Write the folder `paths.dictionary(name)`: SAEs from two seeds, and the activations if they are its own.

    They are in the scratch folder until all are complete, so that a killed run computes none of them again.
    """
    hookpoint = params.stability.hookpoints[0]  # config demands one if there are dictionaries
    seeds = params.seed, params.stability.seeds[0]
    depends = params.model_dump(include={"model", "extract", "train"})
    depends |= {"max_tokens": params.corpus.max_tokens, "hookpoint": hookpoint, "seeds": seeds}
    inputs = [paths.train_texts, paths.tokens, paths.activations / hookpoint]
    with kept(f"dictionary@{name}", depends, inputs) as folder:
        own = at(paths, name, folder / "made")
        if own.activations != paths.activations and not any(own.activations.rglob("index.json")):
            extract(params, paths, own, name, hookpoint, folder)
        if name != "neurons":
            frozen = name.removeprefix("frozen_") if name.startswith("frozen_") else params.train.frozen
            settings = params.train.model_copy(update={"frozen": frozen})
            data = StoredActivations(params, own, hookpoint)
            for out, seed in zip((own.saes, own.saes_again), seeds, strict=True):
                if not (out / hookpoint / "history.csv").is_file():
                    rerun.fit(data, settings, params.hardware, seed, folder / str(seed), out, name)
        if is_first_rank():
            shutil.rmtree(paths.dictionary(name), ignore_errors=True)
            for file in [file for file in (folder / "made").rglob("*") if file.is_file()]:
                move(file, paths.dictionary(name) / file.relative_to(folder / "made"))


def at(paths: Paths, name: str, folder: Path | None = None) -> Paths:
    """The paths of a dictionary: its own SAEs and, if it has them, its own activations.

    `folder`: in which they are; None: in that of the finished dictionary.
    """
    own, folder = copy.copy(paths), folder or paths.dictionary(name)
    own.saes, own.saes_again = folder / "sae", folder / "sae_again"
    if name in ("neurons", "random_model"):
        own.activations = folder / "activations"
    return own


def neurons_of(model: Any, layer: int) -> str:
    """The hookpoint of the neurons of block `layer`: the outputs of its MLP's activation function, found by its name.

    Raises
    ------
    UserError: the block has no such module, or several (experts).
    """
    block = hooks.blocks(model)[layer]
    path = next(path for path, module in hooks.body_of(model).named_modules() if module is block)
    names = [f"{path}.{name}" for name, _ in block.named_modules() if _ACTIVATION.search(name)]
    if len(names) != 1:
        reason = (
            f"several activation functions ({', '.join(names)})" if names else "no module for it (act_fn or similar)"
        )
        raise UserError(
            f"params.yaml: {KEY}: 'neurons' are the outputs of the MLP's activation function, but block {layer} of "
            f"{type(model).__name__} has {reason}; remove 'neurons'"
        )
    return names[0]


def extract(params: Config, paths: Paths, own: Paths, name: str, hookpoint: str, folder: Path) -> None:
    """Write the activations of a dictionary at one hookpoint, in the row order of those of stage `extract`.

    They are those of the random model at `hookpoint`, or of the neurons in its block. `folder` keeps finished shards.
    """
    corpus = read_table(paths.train_texts)
    texts = tokens.tokenize_corpus(loading.load_tokenizer(params.model), corpus, params.corpus.max_tokens)
    shards = extraction.plan(texts, params.extract.batch_tokens)
    model = loading.load_model(params.model, params.extract.dtype)
    read = neurons_of(model, layer_of(hookpoint)) if name == "neurons" else hookpoint
    width = forward.widths(model, [read], KEY)[read]
    if name == "random_model":
        randomise(model, params.seed)
    dtype = params.extract.store_dtype
    is_first = extraction.extract(model, texts, shards, [read], folder, dtype, params.hardware)

    def publish() -> None:
        if is_first:
            for shard in shards:
                number = store.shard_name(shard.number)
                move(folder / read / number, own.activations / read / number)
            rows = [shard.rows for shard in shards]
            store.write_index(own.activations / read, rows, width, dtype, local_name(params.model.name), read)

    together(publish)  # the other processes read them


@torch.no_grad()
def randomise(model: Any, seed: int) -> None:
    """Replace every weight matrix by a normally distributed one of the same mean and standard deviation.

    Embeddings are replaced, too; biases and the weights of norms stay. Tied weights remain tied.
    """
    for number, weight in enumerate(model.parameters()):
        if weight.dim() > 1:
            generator = torch.Generator(device=weight.device).manual_seed(seed * 100_003 + number)
            mean, deviation = weight.float().mean(), weight.float().std()
            weight.normal_(float(mean), float(deviation), generator=generator)
