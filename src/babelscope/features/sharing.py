"""Which latents fire on a text and on its translation."""

from collections.abc import Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray


def parallel_texts(texts: pl.DataFrame, languages: Sequence[str], groups: int) -> pl.DataFrame:
    """The texts of the parallel groups in most languages: `text_id`, `language`, `group`, one text per language.

    Parameters
    ----------
    texts: `text_id`, `language`, `group`, as in data/corpus/texts.parquet.
    groups: maximum number of groups; of groups with as many languages, those of the lowest ids (hashes).
    """
    once = texts.filter(pl.col("language").is_in(list(languages))).sort("text_id")
    once = once.unique(["group", "language"], keep="first", maintain_order=True)
    size = once.group_by("group").len("size").filter(pl.col("size") > 1)
    chosen = size.sort(-pl.col("size").cast(pl.Int64), "group").head(groups)["group"]
    order = pl.col("language").cast(pl.Enum(languages))
    return (
        once.filter(pl.col("group").is_in(chosen.implode())).select("text_id", "language", "group").sort("group", order)
    )


def overlaps(fires: NDArray[np.bool_], texts: pl.DataFrame, languages: Sequence[str]) -> pl.DataFrame:
    """The mean Jaccard index |A & B| / |A | B| of the latents of two texts, translations against random pairs.

    Parameters
    ----------
    fires: `[texts, latents]`, the latents that fire on at least one token of a text.
    texts: `language` and `group` of the rows; a group has a language once at most.
    languages: the order of the result.

    Returns
    -------
    One row per pair of languages with at least two groups in common: `language`, `other`, `groups`, `translations`
    (mean over the groups), `random` (mean over all pairs of texts of different groups among them).
    """
    table = fires.astype(np.float32)
    size, group = fires.sum(1), texts["group"].to_numpy()
    rows = {name: np.flatnonzero((texts["language"] == name).to_numpy()) for name in languages}
    found = []
    for number, first in enumerate(languages):
        for second in languages[number + 1 :]:
            common, a, b = np.intersect1d(group[rows[first]], group[rows[second]], return_indices=True)
            if len(common) < 2:
                continue
            a, b = rows[first][a], rows[second][b]
            both = (table[a] @ table[b].T).astype(np.float64)
            jaccard = both / np.maximum(size[a][:, None] + size[b] - both, 1)
            same = float(np.trace(jaccard))
            other = (float(jaccard.sum()) - same) / (len(common) * (len(common) - 1))
            found.append((first, second, len(common), same / len(common), other))
    names = {"language": pl.String, "other": pl.String, "groups": pl.Int64, "translations": pl.Float64}
    return pl.DataFrame(found, schema=names | {"random": pl.Float64}, orient="row")


def first_component(vectors: NDArray[np.float64]) -> float:
    """The share of the largest eigenvalue of the correlation matrix of the languages' vectors `[languages, d]`.

    The vectors are DiffMeans: a language's mean minus the mean of the other languages' means. Al Ghussin et al. 2026
    (arXiv 2605.23036) take it as the alignment of a layer, 1 minus it as the separability of the languages there, and
    steer at the layer at which both are equal (0.5). nan with fewer than two languages.
    """
    count = len(vectors)
    if count < 2:
        return float("nan")
    others = (vectors.sum(0) - vectors) / (count - 1)
    values = np.linalg.eigvalsh(np.corrcoef(vectors - others)).clip(0)
    return float(values[-1] / values.sum())


def rank_correlation(a: pl.Series, b: pl.Series) -> float | None:
    """Spearman's rank correlation; None with fewer than three pairs, or if one series is constant."""
    frame = pl.DataFrame({"a": a, "b": b}).drop_nulls()
    if len(frame) < 3:
        return None
    value = frame.select(pl.corr("a", "b", method="spearman")).item()
    return float(value) if value is not None and np.isfinite(value) else None
