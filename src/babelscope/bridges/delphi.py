"""`--format delphi`: all firings of latents, in delphi's cache format.

delphi (Paulo et al. 2024, arXiv 2410.13928) explains and scores latents from such a cache. It has a folder for each
hookpoint with `config.json` and a file `<first>_<last>.safetensors` for each range of latents: `locations`
`[firings, 3]` (context, position, latent - first), `activations` `[firings]` (float16), `tokens` `[contexts, longest]`.
A context is a text of the training split: its content tokens from position 0, then padding, on which nothing fires.
"""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file

from babelscope import config, sae
from babelscope.activations.rows import SCHEMA, read_rows
from babelscope.activations.store import opened
from babelscope.config.values import local_name
from babelscope.core import stage
from babelscope.core.errors import UserError, nearest
from babelscope.core.files import write_atomically, write_json
from babelscope.core.paths import Paths
from babelscope.core.progress import Progress
from babelscope.models import loading

# Files per hookpoint, and rows encoded at once.
SPLITS, CHUNK = 5, 8192
LARGEST = torch.finfo(torch.float16).max
log = logging.getLogger(__name__)


def contexts(table: pl.DataFrame, pad: int) -> tuple[NDArray[np.uint32], NDArray[np.int64], NDArray[np.int64]]:
    """Texts as a matrix of tokens `[contexts, longest]`, with context and position of every row of `table`.

    Parameters
    ----------
    table: `text_id`, `token_id`, the rows of a text together, in order.
    pad: id after the end of a text.
    """
    context = table["text_id"].rle_id().cast(pl.Int64).to_numpy()
    first = np.searchsorted(context, np.arange(context[-1] + 1 if len(context) else 0))
    position = np.arange(len(context)) - first[context]
    tokens = np.full((len(first), int(position.max(initial=-1)) + 1), pad, dtype=np.uint32)
    tokens[context, position] = table["token_id"].to_numpy()
    return tokens, context, position


def write_cache(folder: Path, latents: int, tokens: NDArray[np.uint32], locations: NDArray[np.int64],
                activations: NDArray[np.float16]) -> None:  # fmt: skip
    """Write the files of one hookpoint; `locations` as in the cache, but with absolute latent numbers."""
    edges = np.linspace(0, latents, min(SPLITS, latents) + 1).astype(np.int64)
    for start, end in zip(edges[:-1].tolist(), (edges[1:] - 1).tolist(), strict=True):
        in_range = (locations[:, 2] >= start) & (locations[:, 2] <= end)
        relative = locations[in_range] - np.array([0, 0, start])
        small = np.uint16 if relative.max(initial=0) < 2**16 else np.uint32
        content = {"locations": relative.astype(small), "activations": activations[in_range], "tokens": tokens}
        write_atomically(folder / f"{start}_{end}.safetensors", lambda path, c=content: save_file(c, path))  # type: ignore[misc]


def export(hookpoint: str, target: Path, table: pl.DataFrame, pad: int, about: dict[str, Any]) -> int:
    """Write the cache of one hookpoint; returns the number of firings."""
    paths = Paths()
    dictionary = sae.load(paths.saes, hookpoint)
    store = opened(paths, dictionary.input_name(hookpoint))
    tokens, context, position = contexts(table, pad)
    rows = table["row"].to_torch()
    locations, activations, too_large = [], [], 0
    with Progress(f"delphi {hookpoint}", len(rows), "tokens") as progress:
        for first in range(0, len(rows), CHUNK):
            values, indices = dictionary.encode(store.gather(rows[first : first + CHUNK]))
            row, column = (values > 0).nonzero(as_tuple=True)
            token = (row + first).numpy()
            locations.append(np.stack([context[token], position[token], indices[row, column].numpy()], 1))
            fired = values[row, column]
            too_large += int((fired > LARGEST).sum())
            activations.append(fired.clamp(max=LARGEST).to(torch.float16).numpy())
            progress.update(len(values))
    if too_large:
        message = "%s: %s activations above %s, the largest float16, are written as this value"
        log.warning(message, hookpoint, too_large, LARGEST)
    write_cache(target / hookpoint, dictionary.latents, tokens, np.concatenate(locations), np.concatenate(activations))
    write_json(target / hookpoint / "config.json", about | {"ctx_len": tokens.shape[1], "n_tokens": int(tokens.size)})
    return sum(map(len, activations))


def main(target: Path, hookpoints: list[str]) -> None:
    """Write `<target>/<hookpoint>/` for `hookpoints`, or for all of params.yaml.

    Raises
    ------
    UserError: params.yaml does not list the hookpoint, or no activations are stored.
    """
    params = config.load()
    names = hookpoints or params.hookpoints
    for name in names:
        if name not in params.hookpoints:
            raise UserError(f"params.yaml: hookpoints: no {name!r}; {nearest(name, params.hookpoints)}")
    if params.train.source == "stream":
        raise UserError("params.yaml: train.source: 'stream' stores no activations; allowed here: stored, pretrained")
    table = read_rows(Paths(), columns=list(SCHEMA)).filter(split="train")
    tokenizer = loading.load_tokenizer(params.model)
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    about = {
        "model_name": local_name(params.model.name), "dataset_repo": "data/corpus/texts.parquet",
        "dataset_split": "train", "dataset_name": "", "dataset_column": "text", "batch_size": 1,
    }  # fmt: skip
    found = [(name, export(name, target, table, pad, about)) for name in names]
    stage.table(["hookpoint", "firings"], [(name, f"{count:,}") for name, count in found])
