"""From NLL per text to the matrix dNLL[ablated, evaluated], its bootstrap intervals, and how selective it is."""

from collections.abc import Sequence

import numpy as np
import polars
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# Haybittle (1971) and Peto et al. (1976): a test that may end early ends only if p < 0.001, 3.29 standard deviations.
EARLY = 3.29

_CONTROL = (
    {"language": polars.String}
    | dict.fromkeys(["own", "control", "control_high", "others", "control_others"], polars.Float64)
    | dict.fromkeys(["excess", "excess_low", "excess_high"], polars.Float64)
    | dict.fromkeys(["contrast", "contrast_low", "contrast_high"], polars.Float64)
    | dict.fromkeys(["above", "selective", "decided"], polars.Boolean)
    | {"draws": polars.Int32}
)


def cells(
    clean: Floats, ablated: Floats, tokens: NDArray[np.int64], language: Sequence[str], resamples: int, seed: int
) -> polars.DataFrame:
    """NLL per token of each evaluated language under each condition, with a bootstrap interval over its texts.

    `nll = sum of NLL / number of target tokens` (not a mean of per-text means); `delta` is its difference to the clean
    run; `low`, `high` are the 2.5 % and 97.5 % quantiles of `delta` over resamples of the texts (Efron 1979, percentile
    method). Conditions that were evaluated on the same texts share the resamples, so that they can be compared.

    Parameters
    ----------
    clean: nats, `[texts]`.
    ablated: nats, `[conditions, texts]`; NaN for texts on which a condition was not evaluated. A cell is of the texts
        on which it was; without any, it is left out.
    tokens: target tokens, `[texts]`.
    language: of each text.
    resamples: number of bootstrap resamples.
    seed: of the resampling.

    Returns
    -------
    `condition` (row number in `ablated`; -1 is the clean run), `evaluated`, `nll` (that of the clean run on all texts,
    plus `delta`), `tokens` (those evaluated), `delta`, `low`, `high`, the languages in order of first appearance.
    """
    names = list(dict.fromkeys(language))
    of = np.array([names.index(name) for name in language], dtype=np.int64)
    rows: list[dict[str, object]] = []
    for code, name in enumerate(names):
        mine = of == code
        total = int(tokens[mine].sum())
        base = clean[mine].sum() / total if total else float("nan")
        unchanged = {"delta": 0.0, "low": 0.0, "high": 0.0}
        rows.append({"condition": -1, "evaluated": name, "nll": base, "tokens": total, **unchanged})
        change = ablated[:, mine] - clean[mine]
        for known in np.unique(~np.isnan(change), axis=0):
            if not known.any():
                continue
            members = np.flatnonzero((~np.isnan(change) == known).all(axis=1))
            count, random = tokens[mine][known], np.random.default_rng([seed, code])
            deltas, resampled = _means(change[members][:, known], count, resamples, random)
            low, high = np.quantile(resampled, [0.025, 0.975], axis=1)
            for place, condition in enumerate(members):
                cell = {"delta": deltas[place], "low": low[place], "high": high[place]}
                at = {"condition": int(condition), "evaluated": name, "nll": base + deltas[place]}
                rows.append({**at, "tokens": int(count.sum()), **cell})
    return polars.DataFrame(rows, infer_schema_length=None).sort("condition", maintain_order=True)


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


def against_control(
    change: Floats,
    tokens: NDArray[np.int64],
    language: Sequence[str],
    keys: polars.DataFrame,
    languages: Sequence[str],
    resamples: int,
    seed: int,
) -> polars.DataFrame:
    """Whether a language's own units cost it more than random ones that fire as often, and more than they cost others.

    Two differences, each with a 95 % interval: of the own units' delta to the control's, on the language's texts
    (`above` where the interval lies above 0); and of own - others to the control's own - others (`selective`): random
    units may hurt the language just as much, but then they hurt others, too. The intervals are over the texts, which
    both share, and over the draws: every resample of the texts (Efron 1979) takes one draw, all as often.

    Parameters
    ----------
    change: ablated minus clean, nats, `[conditions, texts]`; NaN where a condition was not asked for.
    tokens: target tokens, `[texts]`.
    language: of each text.
    keys: `condition` (row number in `change`), `ablated`, `control` (draw; null: the own units), of conditions that
        were asked for the same other languages' texts in all draws.
    languages: in the order wanted.
    resamples, seed: of the bootstrap.

    Returns
    -------
    `language`; nats/token: `own`, `control` (mean over the draws), `control_high` (97.5 % quantile over texts and
    draws), `others`, `control_others` (both on the texts in other languages that the control was asked for), `excess`,
    `excess_low`, `excess_high` (own - control), `contrast`, `contrast_low`, `contrast_high` (of own - others to the
    control's); `above`, `selective`; `decided`: both differences lie more than `EARLY` standard deviations of their
    resamples from 0, so that more draws would not change what they say; `draws`. A language without draws has no row.
    """
    of = np.array(language, dtype=object)
    rows: list[dict[str, object]] = []
    for code, name in enumerate(languages):
        mine = keys.filter(polars.col("ablated") == name)
        draws = mine.filter(polars.col("control").is_not_null()).sort("control")["condition"].to_list()
        if not draws:
            continue
        order = [mine.filter(polars.col("control").is_null())["condition"].item(), *draws]
        turn = np.arange(resamples) % len(draws)
        random = np.random.default_rng([seed, code])
        inside = of == name
        asked = ~np.isnan(change[order]).any(axis=0)
        here, here_resampled = _means(change[order][:, inside & asked], tokens[inside & asked], resamples, random)
        there, there_resampled = _means(change[order][:, ~inside & asked], tokens[~inside & asked], resamples, random)
        excess = here_resampled[0] - _each(here_resampled[1:], turn)
        contrast = excess - (there_resampled[0] - _each(there_resampled[1:], turn))
        low, high = _quantiles(excess)
        contrast_low, contrast_high = _quantiles(contrast)
        rows.append({
            "language": name,
            "own": here[0],
            "control": here[1:].mean(),
            "control_high": _quantiles(_each(here_resampled[1:], turn))[1],
            "others": there[0],
            "control_others": there[1:].mean(),
            "excess": here[0] - here[1:].mean(),
            "excess_low": low,
            "excess_high": high,
            "contrast": here[0] - here[1:].mean() - (there[0] - there[1:].mean()),
            "contrast_low": contrast_low,
            "contrast_high": contrast_high,
            "above": bool(low > 0),
            "selective": bool(contrast_low > 0),
            "decided": all(abs(x.mean()) > EARLY * x.std() for x in (excess, contrast) if np.isfinite(x).all()),
            "draws": len(draws),
        })  # fmt: skip
    return polars.DataFrame(rows, schema=_CONTROL)


def _each(resampled: Floats, turn: NDArray[np.int64]) -> Floats:
    """Of every resample (`[draws, resamples]`) the value of the draw whose turn it is, `[resamples]`."""
    chosen: Floats = resampled[turn, np.arange(len(turn))]
    return chosen


def _quantiles(values: Floats) -> tuple[float, float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def _means(
    change: Floats, tokens: NDArray[np.int64], resamples: int, random: np.random.Generator
) -> tuple[Floats, Floats]:
    """`sum change / sum tokens` of the texts, `[conditions]`, and of resamples of them, `[conditions, resamples]`."""
    count, texts = tokens.astype(np.float64), len(tokens)
    if not count.sum():
        return np.full(len(change), np.nan), np.full((len(change), resamples), np.nan)
    weight = random.multinomial(texts, np.full(texts, 1 / texts), size=resamples).astype(np.float64)
    return change.sum(axis=1) / count.sum(), (change @ weight.T) / np.maximum(weight @ count, 1.0)
