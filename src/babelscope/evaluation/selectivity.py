"""From NLL per text to the matrix dNLL[ablated, evaluated], its bootstrap intervals, and how selective it is."""

from collections.abc import Sequence

import numpy as np
import polars
from numpy.typing import NDArray
from scipy.stats import t as student_t  # type: ignore[import-untyped]

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


def against_control(table: polars.DataFrame, languages: Sequence[str]) -> polars.DataFrame:
    """Whether a language's own units cost it more than random ones with matched firing rates do.

    The upper end of the control's interval is the larger of two: the largest upper end of a draw's bootstrap interval
    (the texts might have been others), and `mean + t s sqrt(1 + 1/n)` over the n draws, the one-sided 97.5 % prediction
    bound for one more draw (the units might have been others). A language is above where its own delta is larger.

    Parameters
    ----------
    table: `ablated`, `evaluated`, `control` (draw, null: the own units), `delta`, `high` (nats/token).
    languages: in the order wanted.

    Returns
    -------
    `language`, `own` (delta), `control` (mean over the draws), `control_high`, `above` (null without draws).
    """
    rows: list[tuple[str, float, float | None, float | None, bool | None]] = []
    mine = table.filter(polars.col("ablated") == polars.col("evaluated"))
    for name in languages:
        here = mine.filter(polars.col("ablated") == name)
        own = here.filter(polars.col("control").is_null())["delta"].item()
        draws = here.filter(polars.col("control").is_not_null())
        delta, high = draws["delta"].to_numpy(), draws["high"].to_numpy()
        n = len(delta)
        if not n:
            rows.append((name, own, None, None, None))
            continue
        spread = float(student_t.ppf(0.975, n - 1)) * delta.std(ddof=1) * np.sqrt(1 + 1 / n) if n > 1 else 0.0
        upper = max(float(high.max()), float(delta.mean() + spread))
        rows.append((name, own, float(delta.mean()), upper, bool(own > upper)))
    names = {"language": polars.String, "own": polars.Float64, "control": polars.Float64}
    schema = names | {"control_high": polars.Float64, "above": polars.Boolean}
    return polars.DataFrame(rows, schema=schema, orient="row")
