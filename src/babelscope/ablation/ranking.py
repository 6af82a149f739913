"""Which features carry a language: their order by effect, and the effect of the first few of them together."""

from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray

from babelscope.ablation.conditions import TOP
from babelscope.ablation.statistics import Floats, Measured, means

CURVE = (
    {"method": pl.String, "language": pl.String, "top": pl.Int32, "features": pl.Int32, "tokens": pl.Int64}
    | dict.fromkeys(["own", "low", "high", "others", "control"], pl.Float64)
)  # fmt: skip


def ranking(features: pl.DataFrame, effects: Mapping[str, Floats], languages: Sequence[str]) -> pl.DataFrame:
    """Rank every language's features by what removing each alone costs it more than the other languages.

    Parameters
    ----------
    features: `hookpoint`, `layer`, `unit`, `language`, `entropy`, `rank`.
    effects: by hookpoint, the change of the NLL when one unit alone is removed, nats/token, `[languages, latents]`
        (`attribution.attribute`); NaN for a language without text.
    languages: the order of the rows of `effects`.

    Returns
    -------
    The columns of `features`, and `own` (nats/token, on its language), `others` (mean over the other languages),
    `effect` (own - others), `causal_rank` (from 1, by `effect`, largest first, within a language). NaN is last.
    """
    row = {name: number for number, name in enumerate(languages)}
    own, others = [], []
    for hookpoint, unit, language in features.select("hookpoint", "unit", "language").iter_rows():
        values = effects[hookpoint][:, unit]
        rest = np.delete(values, row[language])
        own.append(float(values[row[language]]))
        others.append(float(np.nanmean(rest)) if np.isfinite(rest).any() else 0.0)
    return (
        features.select("hookpoint", "layer", "unit", "language", "entropy", "rank")
        .with_columns(pl.Series("own", own, pl.Float64), pl.Series("others", others, pl.Float64))
        .with_columns(effect=pl.col("own") - pl.col("others"))
        .sort(
            pl.col("language").cast(pl.Enum(languages)), pl.col("effect").fill_nan(None), "rank",
            descending=[False, True, False], nulls_last=True,
        )
        .with_columns(causal_rank=pl.int_range(1, pl.len() + 1).over("language"))
    )  # fmt: skip


def curve(run: Measured) -> tuple[pl.DataFrame, dict[str, float]]:
    """The effect of a language's first units by `causal_rank` together, over their number; and its figures.

    Every number of units, and all of them, are compared on the same texts: those of the `TOP` conditions.

    Returns
    -------
    `CURVE`: `top` (null: all), `features` (the number of units removed), `tokens` (of the language itself), in
    nats/token `own` with its 95 % interval over texts, `others` (on texts of other languages), `control` (the language
    without random units that fire as often as these; null: no control). In a second value the flat figures
    `curve_own/<top>`, `curve_own_low/<top>`, `curve_own_high/<top>`, `curve_others/<top>`, `curve_control/<top>` (means
    over the languages; <top> may be `all`), `features_for_half/<language>`: the smallest number of units measured that
    reaches half of the effect of all (no figure if all have no effect above 0), and `languages_half_by/<top>`: the
    number of languages in which that many units do.
    """
    change, tokens = (run.nll.ablated - run.nll.clean).numpy(), run.nll.tokens.numpy()
    sizes = np.sum([[len(sets) for sets in units] for units in run.conditions.units.values()], axis=0)
    together = run.conditions.keys.filter(
        pl.col("hookpoint").is_null(), pl.col("control").fill_null(0) == 0, ~pl.col("script")
    )
    is_own = np.array(run.language, dtype=object)[None] == np.array(run.languages, dtype=object)[:, None]
    number = {(name, draw, top): row for row, name, draw, top in
              together.select("condition", "ablated", "control", "top").iter_rows()}  # fmt: skip
    rows: list[dict[str, object]] = []
    resampled: dict[int | None, list[Floats]] = {top: [] for top in (*TOP, None)}
    for code, name in enumerate(run.languages):
        known = ~np.isnan(change[number[name, None, TOP[0]]])
        mine, rest = known & is_own[code], known & ~is_own[code]
        for top in (*TOP, None):
            row, draw = number[name, None, top], number.get((name, 0, top))
            # The same resamples of the texts for every number of units.
            random = np.random.default_rng([run.seed, code])
            (own,), (many,) = means(change[[row]][:, mine], tokens[mine], run.resamples, random)
            low, high = np.quantile(many, [0.025, 0.975])
            resampled[top].append(many)
            rows.append({
                "method": run.method, "language": name, "top": top, "features": sizes[row],
                "tokens": tokens[mine].sum(), "own": own, "low": low, "high": high,
                "others": _mean(change[row], tokens, rest),
                "control": None if draw is None else _mean(change[draw], tokens, mine),
            })  # fmt: skip
    found = pl.DataFrame(rows, schema=CURVE)
    figures: dict[str, float] = {}
    for top, of_languages in resampled.items():
        here, key = found.filter(pl.col("top").eq_missing(top)), "all" if top is None else top
        low, high = np.quantile(np.mean(of_languages, axis=0), [0.025, 0.975])
        figures |= {f"curve_own/{key}": _of(here["own"]), f"curve_others/{key}": _of(here["others"])}
        figures |= {f"curve_own_low/{key}": float(low), f"curve_own_high/{key}": float(high)}
        if here["control"].count():
            figures[f"curve_control/{key}"] = _of(here["control"])
    half = dict(for_half(found).iter_rows())
    figures |= {f"features_for_half/{name}": count for name, count in half.items()}
    figures |= {f"languages_half_by/{top}": sum(count <= top for count in half.values()) for top in TOP}
    return found, figures


def for_half(found: pl.DataFrame) -> pl.DataFrame:
    """`language`, `features`: the smallest number of units in `curve` with at least half of the effect of all."""
    everything = pl.col("own").filter(pl.col("top").is_null()).first().over("language")
    reached = found.filter(everything > 0, pl.col("own") >= everything / 2)
    return reached.group_by("language", maintain_order=True).agg(pl.col("features").min())


def _mean(change: Floats, tokens: NDArray[np.int64], where: NDArray[np.bool_]) -> float:
    return float(change[where].sum() / tokens[where].sum()) if tokens[where].sum() else float("nan")


def _of(column: pl.Series) -> float:
    return float(column.fill_nan(None).mean() or 0.0)  # type: ignore[arg-type]
