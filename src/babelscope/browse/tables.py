"""The tables that stage `browse` writes."""

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl
import torch
from torch.nn import functional

from babelscope.browse.firings import BINS, Firings
from babelscope.browse.lens import Extremes
from babelscope.browse.units import KEY
from babelscope.models.pieces import by_piece

SIDES = ("own", "other", "sample")


def examples(
    features: pl.DataFrame, firings: Mapping[str, Firings], text_ids: Sequence[str], texts: pl.DataFrame
) -> pl.DataFrame:
    """The texts shown of each feature.

    `features`: from `units`. `firings`: by hookpoint, its features in the same order. `text_ids`: by the numbers of
    texts in `firings`. `texts`: from `babelscope.models.pieces.cut`, at least all examples.

    Returns
    -------
    `hookpoint`, `layer`, `unit`, `side` (`own`, `other`, `sample`: see `Firings.examples`), `place` (from 0),
    `text_id`, `activations` (list, the largest on each piece of the text, to four significant digits).
    """
    pieces = {row[0]: row[1:] for row in texts.select("text_id", pl.col("pieces").list.len(), "piece").iter_rows()}
    rows: list[tuple[Any, ...]] = []
    for hookpoint, collector in firings.items():
        keys = features.filter(hookpoint=hookpoint).select(KEY).rows()
        for side in SIDES:
            for one in collector.examples(side):
                count, piece = pieces[text_ids[one.text]]
                activations = by_piece(one.activations[: len(piece)].tolist(), piece, count)
                rows.append((*keys[one.feature], side, one.place, text_ids[one.text], activations))
    frame = _table(features, rows, {"text_id": pl.String, "activations": pl.List(pl.Float32)})
    return frame.with_columns(pl.col("activations").list.eval(pl.element().round_sig_figs(4)))


def histograms(features: pl.DataFrame, firings: Mapping[str, Firings]) -> pl.DataFrame:
    """Tokens by activation: `hookpoint`, `layer`, `unit`, `bin`, `low`, `high` (its ends), `own`, `other` (tokens).

    `features`: from `units`, with `largest`, the upper end of the last bin. `firings`: as in `examples`.
    """
    sides = {
        side: pl.Series(
            [row for one in firings.values() for row in one.histogram[number].tolist()], dtype=pl.List(pl.Int64)
        )
        for number, side in enumerate(("own", "other"))
    }
    bins = pl.Series([list(range(BINS))] * len(features), dtype=pl.List(pl.Int32))
    width = pl.col("largest") / BINS
    return (
        features.select(*KEY, "largest")
        .with_columns(bin=bins, **sides)
        .explode("bin", "own", "other")
        .select(*KEY, "bin", (pl.col("bin") * width).alias("low"), ((pl.col("bin") + 1) * width).alias("high"),
                "own", "other")
    )  # fmt: skip


def tokens(features: pl.DataFrame, found: Mapping[str, Extremes], text: Mapping[int, str]) -> pl.DataFrame:
    """The tokens that each feature's direction promotes and suppresses.

    `features`: from `units`. `found`: by hookpoint, its features in the same order; a hookpoint may be missing.
    `text`: the text of every token by id.

    Returns
    -------
    `hookpoint`, `layer`, `unit`, `side` (`promoted`, `suppressed`), `place` (from 0), `token_id`, `token`, `logit` (to
    four significant digits).
    """
    rows: list[tuple[Any, ...]] = []
    for hookpoint, ends in found.items():
        for number, key in enumerate(features.filter(hookpoint=hookpoint).select(KEY).rows()):
            for side, ids, logits in (("promoted", *ends[:2]), ("suppressed", *ends[2:])):
                pairs = zip(ids[number].tolist(), logits[number].tolist(), strict=True)
                rows += [(*key, side, place, token, text[token], logit) for place, (token, logit) in enumerate(pairs)]
    frame = _table(features, rows, {"token_id": pl.Int32, "token": pl.String, "logit": pl.Float32})
    return frame.with_columns(pl.col("logit").round_sig_figs(4))


def neighbours(features: pl.DataFrame, saes: Mapping[str, Any], count: int = 5) -> pl.DataFrame:
    """The latents of the same SAE whose decoder rows have the largest cosine with a feature's.

    Returns
    -------
    `hookpoint`, `layer`, `unit`, `place` (from 0), `neighbour` (unit), `cosine` (to four digits); of a tie, the smaller
    unit comes first.
    """
    rows: list[tuple[Any, ...]] = []
    for hookpoint, sae in saes.items():
        keys = features.filter(hookpoint=hookpoint).select(KEY).rows()
        directions = functional.normalize(sae.W_dec, dim=1)
        units = torch.tensor([key[-1] for key in keys], dtype=torch.int64, device=directions.device)
        for part, own in zip(torch.split(units, 1024), range(0, len(keys), 1024), strict=True):
            cosine = (directions[part] @ directions.T).round(decimals=4)
            cosine.scatter_(1, part.unsqueeze(1), -torch.inf)  # itself
            values, found = cosine.sort(dim=1, descending=True, stable=True)
            for key, units_of, values_of in zip(
                keys[own : own + 1024], found[:, :count].tolist(), values[:, :count].tolist(), strict=True
            ):
                pairs = [pair for pair in zip(units_of, values_of, strict=True) if pair[1] > -1.1]
                rows += [(*key, place, unit, round(value, 4)) for place, (unit, value) in enumerate(pairs)]
    schema = dict(features.select(KEY).schema) | {"place": pl.Int32, "neighbour": pl.Int32, "cosine": pl.Float32}
    return pl.DataFrame(rows, schema=schema, orient="row")


def _table(features: pl.DataFrame, rows: Sequence[tuple[Any, ...]], columns: dict[str, Any]) -> pl.DataFrame:
    schema = dict(features.select(KEY).schema) | {"side": pl.String, "place": pl.Int32} | columns
    return pl.DataFrame(rows, schema=schema, orient="row")
