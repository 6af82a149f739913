"""The texts of the features that are explained, from the stored activations."""

from collections.abc import Sequence

import polars as pl
import torch

from babelscope import sae
from babelscope.activations.rows import read_rows
from babelscope.activations.store import opened
from babelscope.config import Config
from babelscope.core.files import read_table
from babelscope.core.paths import Paths
from babelscope.core.progress import Progress
from babelscope.explain.scores import Case, Text
from babelscope.features.examples import Chosen, Features, Shown, choose, read_texts
from babelscope.models import hardware, loading, tokens
from babelscope.models.pieces import by_piece, cut


def collect(params: Config, paths: Paths) -> list[Case]:
    """The first features of every language with their texts of the training split."""
    # With score.per_layer, several features of a language have the same rank.
    order = pl.col("rank").rank("ordinal").over("language")
    first = read_table(paths.features).filter(kind="sae").filter(order <= params.explain.per_language)
    rows, chosen = zip(*choose_all(first, params, paths), strict=True) if len(first) else ((), ())

    texts = read_texts(paths, params.languages).filter(split="train")
    used = sorted({shown.text for sides in chosen for side in sides for shown in side})
    shown = texts[used]
    tokenizer = loading.load_tokenizer(params.model)
    in_pieces = cut(shown, tokens.spelled(tokenizer, shown["text"].to_list(), params.corpus.max_tokens))
    pieces = dict(zip(used, in_pieces.select("pieces", "piece").rows(), strict=True))

    def spelled(side: Sequence[Shown]) -> list[Text]:
        return [(pieces[n][0], by_piece(values, pieces[n][1], len(pieces[n][0]))) for n, values in side]

    return [Case(row, *map(spelled, sides)) for row, sides in zip(rows, chosen, strict=True)]


def choose_all(features: pl.DataFrame, params: Config, paths: Paths) -> list[tuple[dict[str, object], Chosen]]:
    """The texts of every feature, hookpoint by hookpoint, by their numbers in the training split."""
    device, section = hardware.prepare(params.hardware), params.explain
    table = read_rows(paths, params.languages).filter(split="train").select("row", "text_id")
    row, text = table["row"].to_torch(), table["text_id"].rle_id().cast(pl.Int64).to_torch()
    hookpoints = features["hookpoint"].unique(maintain_order=True).to_list()
    found: list[tuple[dict[str, object], Chosen]] = []
    with Progress("explain, reading", len(row) * len(hookpoints), "tokens") as progress:
        for name in hookpoints:
            of_hookpoint = features.filter(hookpoint=name)
            units = of_hookpoint["unit"].to_list()
            latents = Features(sae.load(paths.saes, name).to(device), torch.tensor(units))
            store = opened(paths, latents.reads(name))
            chosen = choose(
                latents, lambda rows, store=store: store.gather(row[rows]), text, section.examples, section.scored,  # type: ignore[misc]
                [[params.seed, unit] for unit in units], progress.update,
            )  # fmt: skip
            found += zip(of_hookpoint.iter_rows(named=True), chosen, strict=True)
    return found
