"""Stage `dictionary <name>`: one of `baselines.dictionaries`, which show what training and the model contribute.

`frozen_decoder`, `frozen_encoder`: an SAE whose decoder, or encoder, stays as initialised (arXiv 2602.14111).
`random_model`: an SAE on the activations of the model with random weights. `neurons`: the activations of the MLP's
neurons, without an SAE.
"""

import copy
import logging
import shutil
from typing import Any

import torch

from babelscope.activations import extraction, store
from babelscope.config import Config
from babelscope.config.values import local_name
from babelscope.core import stage
from babelscope.core.files import move, read_table
from babelscope.core.paths import Paths
from babelscope.core.resume import kept
from babelscope.models import hookpoints as hooks
from babelscope.models import loading, tokens
from babelscope.sae.training.stored import StoredActivations

log = logging.getLogger(__name__)


def run(params: Config, paths: Paths, name: str) -> None:
    """Write the folder `paths.dictionary(name)`: SAEs from two seeds, and the activations if they are its own."""
    shutil.rmtree(paths.dictionary(name), ignore_errors=True)
    hookpoint = params.stability.hookpoints[0]  # config demands one if there are dictionaries
    own = at(paths, name)
    if name in ("neurons", "random_model"):
        read = neurons_of(hookpoint) if name == "neurons" else hookpoint
        extract(params, paths, own, read, is_random=name == "random_model")
    if name == "neurons":
        return
    for number, seed in enumerate((params.seed, params.stability.seeds[0])):
        train(params, own, name, hookpoint, seed, own.saes_again if number else own.saes)


def at(paths: Paths, name: str) -> Paths:
    """The paths of a dictionary: its own SAEs and, if it has them, its own activations."""
    own, folder = copy.copy(paths), paths.dictionary(name)
    own.saes, own.saes_again = folder / "sae", folder / "sae_again"
    if name in ("neurons", "random_model"):
        own.activations = folder / "activations"
    return own


def neurons_of(hookpoint: str) -> str:
    """The outputs of the activation function of the MLP in the hookpoint's block."""
    layer = ".".join(hookpoint.split(".")[:2])
    return f"{layer}.mlp.act_fn"


def extract(params: Config, paths: Paths, own: Paths, name: str, *, is_random: bool) -> None:
    """Write the activations at one hookpoint in the row order of those of stage `extract`."""
    corpus = read_table(paths.texts)
    texts = tokens.tokenize_corpus(loading.load_tokenizer(params.model), corpus, params.corpus.max_tokens)
    shards = extraction.plan(texts, params.extract.batch_tokens)
    model = loading.load_model(params.model, params.extract.dtype)
    hooks.resolve(model, [name], "baselines.dictionaries")
    if is_random:
        randomise(model, params.seed)
    depends = params.model_dump(include={"model", "extract", "seed"})
    depends |= {"max_tokens": params.corpus.max_tokens, "name": name, "is_random": is_random}
    with kept("dictionary", depends, [paths.texts]) as folder:
        if not extraction.extract(model, texts, shards, [name], folder, params.extract.store_dtype, params.hardware):
            return
        source, target = store.place(folder, name), store.place(own.activations, name)
        for shard in shards:
            move(source / store.shard_name(shard.number), target / store.shard_name(shard.number))
    rows, width = [shard.rows for shard in shards], hooks.width(model, name)
    store.write_index(target, rows, width, params.extract.store_dtype, local_name(params.model.name), name)


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


def train(params: Config, own: Paths, name: str, hookpoint: str, seed: int, out: Any) -> None:
    """Train the SAE of a dictionary and write it to `out / hookpoint`."""
    frozen = name.removeprefix("frozen_") if name.startswith("frozen_") else params.train.frozen
    settings = params.train.model_copy(update={"frozen": frozen})
    data = StoredActivations(params, own, hookpoint)
    with kept("dictionary", {"seed": seed, "train": settings.model_dump()}, data.files) as folder:
        batches = data.batches(seed)
        from babelscope.sae.training.loop import train as fit

        result = fit(batches, settings, params.hardware, seed=seed, folder=folder, label=name)
        if result is None:
            return
        [(sae, history)] = result
        data.save(sae, history, out / hookpoint)
    stage.table(["dictionary", "seed", "FVU (last batch)"], [[name, seed, f"{history[-1]['fvu']:.3f}"]])
