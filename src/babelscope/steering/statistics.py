"""Scores of the methods with bootstrap intervals, and whether features steer better than one mean difference."""

from collections.abc import Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray

Floats = NDArray[np.float64]

NOTHING, PROMPT, FEATURES = "nothing", "prompt", "features"


def shares(rows: pl.DataFrame, languages: Sequence[str], slots: int) -> tuple[Floats, Floats]:
    """Per language and prompt: whether the text is forced, and relevant; `[languages, slots]` each, NaN: no text.

    `rows`: `language`, `slot` (the prompt's number), `forced`, `relevant`.
    """
    table = np.full((2, len(languages), slots), np.nan)
    number = {name: code for code, name in enumerate(languages)}
    for language, slot, forced, relevant in rows.select("language", "slot", "forced", "relevant").iter_rows():
        table[:, number[language], slot] = forced, relevant
    return table[0], table[1]


def harmonic(forced: Floats, relevant: Floats) -> Floats:
    """`2 F R / (F + R)`, and 0 if both are 0; arrays of one shape."""
    total = forced + relevant
    return np.divide(2 * forced * relevant, total, out=np.zeros_like(total), where=total > 0)


def resampled(forced: Floats, relevant: Floats, weight: Floats) -> Floats:
    """The mean over the languages of their harmonic means, in every resample of the prompts; `[resamples]`.

    Parameters
    ----------
    forced, relevant: `[languages, slots]`, see `shares`.
    weight: how often each prompt is in a resample, `[resamples, slots]`. All methods and languages use the same
        resamples, since they answer the same prompts.
    """
    known = ~np.isnan(forced)
    count = np.maximum(known.astype(float) @ weight.T, 1e-12)
    f, r = (np.nan_to_num(x) @ weight.T / count for x in (forced, relevant))
    mean: Floats = harmonic(f, r)[known.any(1)].mean(axis=0)
    return mean


def weights(slots: int, resamples: int, seed: int) -> Floats:
    """Bootstrap resamples of the prompts (Efron 1979); the first row is the sample itself, `[1 + resamples, slots]`."""
    drawn = np.random.default_rng(seed).multinomial(slots, np.full(slots, 1 / slots), size=resamples)
    return np.concatenate([np.ones((1, slots)), drawn]).astype(np.float64)


def interval(values: Floats) -> tuple[float, float, float]:
    """The value of the sample (the first), and the 2.5 % and 97.5 % quantiles of its resamples."""
    low, high = np.quantile(values[1:], [0.025, 0.975]) if len(values) > 1 else (values[0], values[0])
    return float(values[0]), float(low), float(high)


def figures(
    rows: pl.DataFrame, methods: Sequence[str], languages: Sequence[str], apart: Sequence[str], features: str | None,
    *, slots: int, resamples: int, seed: int,
) -> dict[str, float | str]:  # fmt: skip
    """Figures of the answers, by flat key.

    Parameters
    ----------
    rows: greedy answers: `method`, `language`, `slot`, `forced`, `relevant`, `distinct_2`, `nll` (null: not computed).
    methods, languages: in the order wanted.
    apart: languages of the prompts, which are in no mean.
    features: the method whose difference to `diffmean` is the verdict; None: there is none.
    slots: number of prompts of a language.
    resamples, seed: of the bootstrap.

    Returns
    -------
    `harmonic/<method>` with `_low`, `_high` (95 %), `forcing/<method>`, `relevance/<method>`, `distinct_2/<method>`,
    `nll/<method>`, means over the languages that no prompt is in; `<method>/harmonic/<language>`,
    `<method>/forcing/<language>`, `<method>/relevance/<language>` of every language; `best` (of the methods with
    vectors, that of the highest harmonic mean) and `best_harmonic`; `features_minus_diffmean` with `_low`, `_high`, and
    `verdict`: "better", "worse" or "undecided".
    """
    weight, numbers = weights(slots, resamples, seed), dict[str, float | str]()
    means: dict[str, Floats] = {}
    inside = [name for name in languages if name not in apart]
    for method in methods:
        own = rows.filter(method=method)
        for name in languages:
            here = own.filter(language=name)
            if here.is_empty():
                continue
            f, r = (float(here[key].mean()) for key in ("forced", "relevant"))  # type: ignore[arg-type]
            both = float(harmonic(np.array([f]), np.array([r]))[0])
            numbers |= {f"{method}/{key}/{name}": value
                        for key, value in (("harmonic", both), ("forcing", f), ("relevance", r))}  # fmt: skip
        own = own.filter(pl.col("language").is_in(inside))
        if own.is_empty():
            continue
        means[method] = resampled(*shares(own, inside, slots), weight)
        value, low, high = interval(means[method])
        numbers |= {f"harmonic/{method}": value, f"harmonic_low/{method}": low, f"harmonic_high/{method}": high}
        for key, column in (
            ("forcing", "forced"),
            ("relevance", "relevant"),
            ("distinct_2", "distinct_2"),
            ("nll", "nll"),
        ):
            found = own.group_by("language", maintain_order=True).agg(pl.col(column).mean())[column].mean()
            numbers |= {} if found is None else {f"{key}/{method}": float(found)}  # type: ignore[arg-type]
    if by_vector := [method for method in means if method not in (NOTHING, PROMPT)]:
        best = max(by_vector, key=lambda method: means[method][0])
        numbers |= {"best": best, "best_harmonic": float(means[best][0])}
    if features in means and "diffmean" in means:
        value, low, high = interval(means[features] - means["diffmean"])
        numbers |= {"features_minus_diffmean": value, "features_minus_diffmean_low": low,
                    "features_minus_diffmean_high": high, "features_method": features,
                    "verdict": "better" if low > 0 else "worse" if high < 0 else "undecided"}  # fmt: skip
    return numbers


def pick(chosen: pl.DataFrame, apart: Sequence[str]) -> str | None:
    """The feature method of the highest development score; the first of equal ones; None if there is none.

    `chosen`: `method`, `language`, `score`, a row per method and language with a vector. Scores are added up over the
    languages that are not in `apart`, so that a language without a vector counts as 0.
    """
    rows = chosen.filter(pl.col("method").str.starts_with(FEATURES), ~pl.col("language").is_in(list(apart)))
    scores = dict(rows.group_by("method", maintain_order=True).agg(pl.col("score").sum()).iter_rows())
    return max(scores, key=lambda name: scores[name], default=None)
