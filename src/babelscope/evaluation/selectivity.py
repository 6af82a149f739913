"""From NLL per text to the matrix dNLL[ablated, evaluated], its bootstrap intervals, and how selective it is."""

from collections.abc import Sequence

import numpy as np
import polars
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def cells(
    clean: Floats, ablated: Floats, tokens: NDArray[np.int64], language: Sequence[str], resamples: int, seed: int
) -> polars.DataFrame:
    """NLL per token of each evaluated language under each condition, with a bootstrap interval over its texts.

    `nll = sum of NLL / number of target tokens` (not a mean of per-text means); `delta` is its difference to the clean
    run; `low`, `high` are the 2.5 % and 97.5 % quantiles of `delta` over resamples of the texts (Efron 1979, percentile
    method). All conditions share the resamples, so that they can be compared.

    Parameters
    ----------
    clean: nats, `[texts]`.
    ablated: nats, `[conditions, texts]`; NaN where a condition was not asked for: its cell is left out.
    tokens: target tokens, `[texts]`.
    language: of each text.
    resamples: number of bootstrap resamples.
    seed: of the resampling.

    Returns
    -------
    `condition` (row number in `ablated`; -1 is the clean run), `evaluated`, `nll`, `tokens`, `delta`, `low`, `high`,
    the languages in order of first appearance.
    """
    names = list(dict.fromkeys(language))
    of = np.array([names.index(name) for name in language], dtype=np.int64)
    rows: list[dict[str, object]] = []
    for code, name in enumerate(names):
        mine = of == code
        count, total = tokens[mine].astype(np.float64), int(tokens[mine].sum())
        base = clean[mine].sum() / total if total else float("nan")
        unchanged = {"delta": 0.0, "low": 0.0, "high": 0.0}
        rows.append({"condition": -1, "evaluated": name, "nll": base, "tokens": total, **unchanged})
        change = ablated[:, mine] - clean[mine]
        low, high = _interval(change, count, resamples, np.random.default_rng([seed, code]))
        for condition, text_change in enumerate(change):
            if np.isnan(text_change).any():  # not asked for
                continue
            delta = text_change.sum() / total if total else float("nan")
            row = {"condition": condition, "evaluated": name, "nll": base + delta, "tokens": total, "delta": delta}
            rows.append({**row, "low": low[condition], "high": high[condition]})
    return polars.DataFrame(rows, infer_schema_length=None).sort("condition", maintain_order=True)


def _interval(change: Floats, count: Floats, resamples: int, random: np.random.Generator) -> tuple[Floats, Floats]:
    """The 2.5 % and 97.5 % quantiles of `sum change / sum count` over resamples of the texts, `[conditions]` each."""
    texts = len(count)
    if not texts or not count.sum():
        nothing = np.full(len(change), np.nan)
        return nothing, nothing
    weight = random.multinomial(texts, np.full(texts, 1 / texts), size=resamples).astype(np.float64)
    delta = (change @ weight.T) / np.maximum(weight @ count, 1.0)
    low, high = np.quantile(delta, [0.025, 0.975], axis=1)
    return low, high


def selectivity(matrix: polars.DataFrame, languages: Sequence[str]) -> dict[str, float]:
    """How much more an ablation hurts its own language than others.

    Parameters
    ----------
    matrix: `ablated`, `evaluated`, `delta` (nats/token), one row per cell.
    languages: rows and columns of the matrix.

    Returns
    -------
    `own` and `others`: means of the diagonal and of the rest (nats/token); `others_abs`: mean of the rest's absolute
    values; `difference`: own - others; `ratio`: exp(own) / exp(others), the ratio of perplexity factors; `rows`,
    `columns`: in how many rows and columns the diagonal alone is the largest; `dnll_own/<language>`.
    """
    table = {(row["ablated"], row["evaluated"]): row["delta"] for row in matrix.iter_rows(named=True)}
    delta = np.array([[table[a, e] for e in languages] for a in languages])
    own, off = np.diag(delta), ~np.eye(len(languages), dtype=bool)
    rest = delta[off] if len(languages) > 1 else np.zeros(1)
    below = np.where(off, delta, -np.inf)
    result = {
        "own": float(own.mean()),
        "others": float(rest.mean()),
        "others_abs": float(np.abs(rest).mean()),
        "difference": float(own.mean() - rest.mean()),
        "ratio": float(np.exp(own.mean() - rest.mean())),
        "rows": int((own > below.max(axis=1)).sum()),
        "columns": int((own > below.max(axis=0)).sum()),
    }
    return result | {f"dnll_own/{name}": float(value) for name, value in zip(languages, own, strict=True)}
