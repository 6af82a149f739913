"""The vectors that steer towards a language, from the training split, and their files.

Every vector is added to the residual stream after a block, its place (`layers.12`). The MLP's contribution is the last
one that a block adds, so a decoder row of an SAE on this contribution writes at the same place. All vectors of a
language at a place have the length of its DiffMean vector, so that strength 1 means the same for all directions.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from babelscope.core.files import write_atomically
from babelscope.models.forward import read_batches
from babelscope.models.names import parts_of
from babelscope.models.tokens import TokenizedTexts
from babelscope.sae.autoencoder import SAE

# By method, by place, by language: `[d]`.
Vectors = dict[str, dict[str, dict[str, Tensor]]]

# Of the within-class covariance's mean variance, added to its diagonal: there are about as many tokens as dimensions.
_SHRINKAGE = 0.1


def place_of(hookpoint: str) -> str:
    """The residual stream after the block of a hookpoint: `layers.12` for `layers.12.post_feedforward_layernorm`.

    `layers.12.input` is the residual stream before the block, and is its own place.
    """
    parts = parts_of(hookpoint)
    return hookpoint if parts is None or parts[1] in ("", "input") else hookpoint.removesuffix(f".{parts[1]}")


def collect(
    model: Any, texts: TokenizedTexts, languages: Sequence[str], places: Sequence[str], tokens: int, batch_tokens: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Activations of about `tokens` content tokens of each language at every place, from one pass.

    The texts are taken in the order of their ids, which are hashes.

    Returns
    -------
    Float32 `[tokens, d]` by place, and the position in `languages` of each token's language, int64 `[tokens]`.
    """
    frame = texts.frame.with_row_index("number").sort("text_id")
    before = pl.col("tokens").cum_sum().over("language") - pl.col("tokens")
    numbers = frame.filter(before < tokens)["number"].sort().to_list()
    codes, parts, found = texts.codes(languages), {name: list[Tensor]() for name in places}, []
    for activations, text in read_batches(model, texts, texts.batches(batch_tokens, numbers), places, torch.float32):
        found.append(codes[text])
        for name in places:
            parts[name].append(activations[name].cpu())
    return {name: torch.cat(rows) for name, rows in parts.items()}, torch.cat(found)


def means(rows: Tensor, codes: Tensor, count: int) -> Tensor:
    """The mean row of each of `count` languages, float32 `[count, d]`."""
    total = torch.zeros((count, rows.shape[1])).index_add_(0, codes, rows)
    return total / torch.bincount(codes, minlength=count).clamp_min(1).unsqueeze(1)


def others(mean: Tensor) -> Tensor:
    """For each language, the mean over the other languages of their means; `mean` is `[languages, d]`."""
    return (mean.sum(0) - mean) / max(1, len(mean) - 1)


def directions(method: str, rows: Tensor, codes: Tensor, count: int) -> Tensor:
    """Directions towards each language in the space of `rows`, float32 `[count, d]`.

    `diffmean`: the language's mean minus the mean over the other languages of their means (CLaS-Bench, arXiv
    2601.08331). `pca`: the first principal component of the language's tokens around the mean of the other languages,
    with the sign of DiffMean. `probe`: Fisher's linear discriminant of the language against the others, `(S + c I)^-1
    (mean - others)`, S being the covariance within the languages and c a tenth of its mean variance.

    Parameters
    ----------
    rows: float32 `[tokens, d]`.
    codes: the language of each row, int64 `[tokens]`.
    count: number of languages.
    """
    mean = means(rows, codes, count)
    difference = mean - others(mean)
    if method == "diffmean":
        return difference
    if method == "pca":
        found = []
        for code, centre in enumerate(others(mean)):
            away = rows[codes == code] - centre
            first = torch.linalg.eigh((away.T @ away).double()).eigenvectors[:, -1].float()
            found.append(first * torch.sign(first @ difference[code]))
        return torch.stack(found)
    within = rows - mean[codes]
    covariance = (within.T @ within).double() / len(within)
    covariance += _SHRINKAGE * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=torch.float64)
    solved: Tensor = torch.linalg.solve(covariance, difference.double().T).T.float()
    return solved


def of_features(dictionary: SAE, units: Sequence[int], activations: Sequence[float]) -> Tensor:
    """`sum_u m_u W_dec[u]`, float32 `[d]`: what `units`, each as active as in `activations`, write."""
    index = torch.tensor(list(units), dtype=torch.int64, device=dictionary.W_dec.device)
    weight = torch.tensor(list(activations), dtype=torch.float32, device=dictionary.W_dec.device)
    return (weight @ dictionary.W_dec.detach()[index]).cpu()


def ranked(features: pl.DataFrame, effects: pl.DataFrame | None) -> pl.DataFrame:
    """SAE features in the order in which the first ones are taken: by their causal effect if it is known, else by rank.

    `features`: `hookpoint`, `unit`, `language`, `rank`; `effects`: the same and `causal_rank` instead of `rank`.
    """
    if effects is None:
        return features.sort("rank")
    keys = ["hookpoint", "unit", "language"]
    known = features.join(effects.select(*keys, "causal_rank"), on=keys, how="left")
    return known.sort("causal_rank", "rank", nulls_last=True)


def mean_activations(counts: pl.DataFrame, totals: pl.DataFrame) -> pl.DataFrame:
    """`unit`, `language`, `mean`: the activation of each unit per token of the language, firing or not."""
    return counts.join(totals.select("language", total="tokens"), on="language").select(
        "unit", "language", mean=pl.col("sum") / pl.col("total")
    )


def sae_diffmean(dictionary: SAE, activations: pl.DataFrame, languages: Sequence[str]) -> Tensor:
    """DiffMean in the space of the latents, written by the decoder: `(m_l - mean of the other m) W_dec`, `[n, d]`.

    `activations` is the result of `mean_activations`.
    """
    table = torch.zeros((len(languages), dictionary.latents))
    known = activations.filter(pl.col("language").is_in(list(languages)))
    code = known["language"].cast(pl.Enum(list(languages))).to_physical().cast(pl.Int64).to_torch()
    table[code, known["unit"].cast(pl.Int64).to_torch()] = known["mean"].cast(pl.Float32).to_torch()
    return (table - others(table)) @ dictionary.W_dec.detach().cpu()


def as_long_as(vectors: Tensor, wanted: Tensor) -> Tensor:
    """`vectors` with the lengths of `wanted`, row by row; a row of zeros stays."""
    factor: Tensor = wanted.norm(dim=1) / vectors.norm(dim=1).clamp_min(1e-30)
    return vectors * factor.unsqueeze(1)


def write(folder: Path, vectors: Vectors) -> None:
    """Write `<method>.safetensors`, with a tensor `<place>/<language>` (float32 `[d]`) for each vector."""
    for method, places in vectors.items():
        tensors = {
            f"{place}/{language}": vector.contiguous().clone()
            for place, languages in places.items()
            for language, vector in languages.items()
        }
        write_atomically(folder / f"{method}.safetensors", partial(save_file, tensors))


def read(path: Path) -> dict[str, dict[str, Tensor]]:
    """The vectors of one method, by place and language (see `write`)."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, vector in load_file(path).items():
        place, _, language = name.rpartition("/")
        found.setdefault(place, {})[language] = vector
    return found


def table(languages: Sequence[str], rows: Tensor) -> Mapping[str, Tensor]:
    """Rows by language, without those that are 0."""
    return {name: row for name, row in zip(languages, rows, strict=True) if bool(row.any())}
