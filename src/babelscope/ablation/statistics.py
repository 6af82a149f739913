"""Tables of a run from its NLL per text: dNLL[ablated, evaluated], bootstrap intervals, controls, and key figures."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from babelscope.ablation.ablate import TextNLL
from babelscope.ablation.conditions import Conditions
from babelscope.models.names import layer_of

Floats = NDArray[np.float64]
COLUMNS = ["method", "kind", "ablated", "control", "evaluated", "nll", "tokens", "delta", "low", "high"]

# Haybittle (1971) and Peto et al. (1976): a test that may end early ends only if p < 0.001, 3.29 standard deviations.
EARLY = 3.29
# It also needs this many texts on each side: a bootstrap of fewer says too little about their spread.
ENOUGH = 5

_CONTROL = (
    {"language": pl.String}
    | dict.fromkeys(["own", "control", "control_high", "others", "control_others"], pl.Float64)
    | dict.fromkeys(["excess", "excess_low", "excess_high"], pl.Float64)
    | dict.fromkeys(["contrast", "contrast_low", "contrast_high"], pl.Float64)
    | dict.fromkeys(["above", "selective", "decided"], pl.Boolean)
    | {"draws": pl.Int32}
    | dict.fromkeys(["p", "p_holm", "contrast_p", "contrast_p_holm", "detectable"], pl.Float64)
)
# A true difference of this many standard errors is found at the two-sided level of 5 % in 80 % of all experiments:
# the 97.5 % and the 80 % quantile of the normal distribution.
DETECTABLE = 1.95996 + 0.84162
# A comparison counts after Holm's correction if its corrected p is below this.
LEVEL = 0.05
# Columns that are also figures per language.
_OF_CONTROL = ("control", "control_high", "detectable")


class Measured(NamedTuple):
    """The NLLs of one method, and all else that its tables need.

    Attributes
    ----------
    nll: measured under `conditions` by `method`.
    language: of each text.
    languages: the order of rows.
    resamples, seed: of the bootstrap over the texts, see `cells`.
    """

    nll: TextNLL
    conditions: Conditions
    method: str
    language: Sequence[str]
    languages: Sequence[str]
    resamples: int
    seed: int


def tables(run: Measured) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The cells of one method, and the comparison of every language's own units with its controls.

    Returns
    -------
    `COLUMNS`, `hookpoint` (null: all) and `layer`, with `ablated` null in the clean run; and in a second frame `method`
    and the columns of `against_control`.
    """
    clean, ablated, tokens = run.nll.clean.numpy(), run.nll.ablated.numpy(), run.nll.tokens.numpy()
    found = (
        cells(clean, ablated, tokens, run.language, run.resamples, run.seed)
        .join(run.conditions.keys, on="condition", how="left", maintain_order="left")
        .with_columns(
            method=pl.lit(run.method),
            kind=pl.lit("neuron" if run.method == "neuron" else "sae"),
            layer=pl.col("hookpoint").map_elements(layer_of, return_dtype=pl.Int32),
        )
        # Controls are evaluated on few texts of other languages, which make no cells; for top units see `curve`.
        .filter(
            pl.col("top").is_null(),
            ~pl.col("script").fill_null(False),
            pl.col("control").is_null() | (pl.col("ablated") == pl.col("evaluated")),
        )
        .sort("condition", pl.col("evaluated").cast(pl.Enum(run.languages)))
        .select(*COLUMNS, "hookpoint", "layer")
    )
    return found, compared(run)


def compared(run: Measured, *, script: bool = False) -> pl.DataFrame:
    """`method` and `against_control`; `script`: against units of the same script."""
    change, tokens = (run.nll.ablated - run.nll.clean).numpy(), run.nll.tokens.numpy()
    keys = pool(run.conditions.keys, script)
    found = against_control(change, tokens, run.language, keys, run.languages, run.resamples, run.seed)
    return found.select(pl.lit(run.method).alias("method"), pl.all())


def pool(keys: pl.DataFrame, script: bool) -> pl.DataFrame:
    """The rows of all hookpoints and all units together, and of their controls of one kind (see `Conditions`)."""
    is_kind = pl.col("control").is_null() | (pl.col("script") == script)
    return keys.filter(pl.col("hookpoint").is_null(), pl.col("top").is_null(), is_kind)


def against_script(control: pl.DataFrame) -> dict[str, float]:
    """Key figures of the comparison with units of the same script (`compared`), by flat key.

    `dnll_control_script/<language>` (mean over the draws, nats/token) with `dnll_control_script_high/<language>`;
    `dnll_control_script` (mean over the languages); `languages_with_script` (that share their script with another one);
    `languages_above_script`, `languages_above_script_holm`: how many of them are `above` these controls, as in
    `figures`. Empty without such controls.
    """
    if control.is_empty():
        return {}
    figures: dict[str, float] = {}
    for name, value, high in control.select("language", "control", "control_high").iter_rows():
        figures |= {f"dnll_control_script/{name}": value, f"dnll_control_script_high/{name}": high}
    above = control.filter("above")
    return figures | {
        "dnll_control_script": float(control["control"].mean()),  # type: ignore[arg-type]
        "languages_with_script": len(control),
        "languages_above_script": len(above),
        "languages_above_script_holm": above.filter(pl.col("p_holm") < LEVEL).height,
    }


def figures(found: pl.DataFrame, controls: pl.DataFrame, languages: Sequence[str]) -> dict[str, float]:
    """The key figures of `tables`, by flat key.

    Those of `selectivity`; `rows_above_zero`: number of rows in which the 95 % interval of the diagonal is above 0;
    `languages_above_control`, `languages_selective`: number of languages that are `above` and `selective`; with
    `_holm`: number of these whose `p_holm` or `contrast_p_holm` is below `LEVEL`; `control/<language>`,
    `control_high/<language>`, `detectable/<language>`: as in `against_control`;
    `nll_clean/<language>`; `own_alone/<hookpoint>`, `others_alone/<hookpoint>`: means over the cells of each hookpoint
    alone.
    """
    together = found.filter(pl.col("hookpoint").is_null())
    matrix = together.filter(pl.col("ablated").is_not_null(), pl.col("control").is_null())
    clean = together.filter(pl.col("ablated").is_null())
    numbers: dict[str, float] = selectivity(matrix, languages)
    diagonal = matrix.filter(pl.col("ablated") == pl.col("evaluated"))
    numbers["rows_above_zero"] = int((diagonal["low"] > 0).sum())
    numbers |= {f"nll_clean/{name}": value for name, value in clean.select("evaluated", "nll").iter_rows()}
    numbers["tokens"] = int(clean["tokens"].sum())
    if len(controls):
        numbers["languages_above_control"] = int(controls["above"].sum())
        numbers["languages_selective"] = int(controls["selective"].sum())
        # A language far below its control has a small p, too: only those above it count.
        for key, verdict, p in (("above_control", "above", "p_holm"), ("selective", "selective", "contrast_p_holm")):
            numbers[f"languages_{key}_holm"] = controls.filter(pl.col(verdict), pl.col(p) < LEVEL).height
        numbers["control"] = float(controls["control"].mean())  # type: ignore[arg-type]
        for name, *values in controls.select("language", *_OF_CONTROL).iter_rows():
            numbers |= {f"{key}/{name}": value for key, value in zip(_OF_CONTROL, values, strict=True)}
    alone = found.filter(pl.col("hookpoint").is_not_null())
    is_own = pl.col("ablated") == pl.col("evaluated")
    for key, cells_alone in (("own_alone", alone.filter(is_own)), ("others_alone", alone.filter(~is_own))):
        means = cells_alone.group_by("hookpoint", maintain_order=True).agg(pl.col("delta").mean())
        numbers |= {f"{key}/{name}": value for name, value in means.iter_rows()}
    return numbers


def divergence(run: Measured) -> dict[str, float]:
    """How far the distribution of the next token moves when all units of a language are removed, by flat key.

    `kl_own/<language>`: mean KL divergence from the distribution of the clean run, over the sampled tokens of the
    language itself, nats/token; `kl_others/<language>`: that over those of the other languages; `kl_own`, `kl_others`:
    means over the languages. Without a sampled token, there is no figure.
    """
    kl, of_text = run.nll.kl.numpy(), np.array(run.language, dtype=object)
    row = dict(run.conditions.keys.filter(run.conditions.whole()).select("ablated", "condition").iter_rows())
    figures: dict[str, float] = {}
    for key in ("kl_own", "kl_others"):
        found = {}
        for name in run.languages:
            here = np.isfinite(kl[row[name]]) & ((of_text == name) == (key == "kl_own"))
            if count := int(run.nll.sampled.numpy()[here].sum()):
                found[f"{key}/{name}"] = float(kl[row[name], here].sum() / count)
        figures |= found | ({key: float(np.mean([*found.values()]))} if found else {})
    return figures


def cells(
    clean: Floats, ablated: Floats, tokens: NDArray[np.int64], language: Sequence[str], resamples: int, seed: int
) -> pl.DataFrame:
    """NLL per token of each evaluated language under each condition, with a bootstrap interval over its texts.

    `nll = sum of NLL / number of target tokens` (not a mean of per-text means); `delta` is its difference to the clean
    run; `low`, `high` are the 2.5 % and 97.5 % quantiles of `delta` over resamples of the texts (Efron 1979, percentile
    method). Conditions that were evaluated on the same texts share the resamples, so that they can be compared.

    Parameters
    ----------
    clean: nats, `[texts]`.
    ablated: nats, `[conditions, texts]`; NaN for texts on which a condition was not evaluated. They are not part of a
        cell, and a cell without texts is left out.
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
    codes = np.array([names.index(name) for name in language], dtype=np.int64)
    rows: list[dict[str, object]] = []
    for code, name in enumerate(names):
        own = codes == code
        total = int(tokens[own].sum())
        base = clean[own].sum() / total if total else float("nan")
        unchanged = {"delta": 0.0, "low": 0.0, "high": 0.0}
        rows.append({"condition": -1, "evaluated": name, "nll": base, "tokens": total, **unchanged})
        change = ablated[:, own] - clean[own]
        for known in np.unique(~np.isnan(change), axis=0):
            if not known.any():
                continue
            members = np.flatnonzero((~np.isnan(change) == known).all(axis=1))
            count, random = tokens[own][known], np.random.default_rng([seed, code])
            deltas, resampled = means(change[members][:, known], count, resamples, random)
            low, high = np.quantile(resampled, [0.025, 0.975], axis=1)
            for row, condition in enumerate(members):
                rows.append({
                    "condition": int(condition), "evaluated": name, "nll": base + deltas[row],
                    "tokens": int(count.sum()), "delta": deltas[row], "low": low[row], "high": high[row],
                })  # fmt: skip
    return pl.DataFrame(rows, infer_schema_length=None).sort("condition", maintain_order=True)


def selectivity(matrix: pl.DataFrame, languages: Sequence[str]) -> dict[str, float]:
    """How much more an ablation hurts its own language than others.

    Parameters
    ----------
    matrix: `ablated`, `evaluated`, `delta` (nats/token), one row per cell.
    languages: rows and columns of the matrix.

    Returns
    -------
    `own` and `others`: means of the diagonal and of the rest (nats/token); `others_abs`: mean of the rest's absolute
    values; `difference`: own - others; `ratio`: exp(own) / exp(others), the ratio of perplexity factors; `rows`,
    `columns`: number of rows and columns whose only largest value is on the diagonal; `dnll_own/<language>`.
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
    keys: pl.DataFrame,
    languages: Sequence[str],
    resamples: int,
    seed: int,
) -> pl.DataFrame:
    """Whether removing its own units costs a language more than removing random units, and more than it costs others.

    Two differences, each with a 95 % interval: the own units' delta minus the control's, on the language's texts
    (`above` if the interval is above 0); and own - others minus the same of the control (`selective`), since random
    units may hurt the language just as much, but then they hurt others, too. The intervals are over the texts on which
    all draws were evaluated, and over the draws: resamples of the texts (Efron 1979) use the draws in turn.

    Parameters
    ----------
    change: ablated minus clean, nats, `[conditions, texts]`; NaN where a condition was not evaluated.
    tokens: target tokens, `[texts]`.
    language: of each text.
    keys: `condition` (row number in `change`), `ablated`, `control` (draw; null: own units).
    languages: in the order wanted.
    resamples, seed: of the bootstrap.

    Returns
    -------
    `language`; nats/token: `own`, `control` (mean over the draws), `control_high` (97.5 % quantile over texts and
    draws), `others`, `control_others` (both on the texts in other languages), `excess`, `excess_low`, `excess_high`
    (own - control), `contrast`, `contrast_low`, `contrast_high` (own - others, less the control's); `above`,
    `selective`; `decided`: with `ENOUGH` texts both differences are more than `EARLY` standard deviations of their
    resamples from 0, so that more texts or draws would hardly change the verdict; `draws`; `p` (of `excess`) and
    `contrast_p`, see `p_value`; `p_holm`, `contrast_p_holm`: the same after `holm` over all rows;
    `detectable`: the `excess` that this experiment would find with 80 % power, `DETECTABLE` times the standard
    deviation of its resamples. NaN: no text to compare. A language without draws has no row.
    """
    is_in = np.array(language, dtype=object) == np.array(languages, dtype=object)[:, None]
    rows: list[dict[str, object]] = []
    for code, name in enumerate(languages):
        sets = keys.filter(pl.col("ablated") == name)
        draws = sets.filter(pl.col("control").is_not_null()).sort("control")["condition"].to_list()
        if not draws:
            continue
        order = [sets.filter(pl.col("control").is_null())["condition"].item(), *draws]
        turn = np.arange(resamples) % len(draws)
        random = np.random.default_rng([seed, code])
        known = ~np.isnan(change[order]).any(axis=0)
        is_own, is_other = known & is_in[code], known & ~is_in[code]
        own, own_resampled = means(change[order][:, is_own], tokens[is_own], resamples, random)
        other, other_resampled = means(change[order][:, is_other], tokens[is_other], resamples, random)
        # In every resample, the draw whose turn it is.
        own_control, other_control = (x[1:][turn, np.arange(resamples)] for x in (own_resampled, other_resampled))
        excess = own_resampled[0] - own_control
        contrast = excess - (other_resampled[0] - other_control)
        (low, high), (contrast_low, contrast_high) = (np.quantile(x, [0.025, 0.975]) for x in (excess, contrast))
        rows.append({
            "language": name,
            "own": own[0],
            "control": own[1:].mean(),
            "control_high": np.quantile(own_control, 0.975),
            "others": other[0],
            "control_others": other[1:].mean(),
            "excess": own[0] - own[1:].mean(),
            "excess_low": low,
            "excess_high": high,
            "contrast": own[0] - own[1:].mean() - (other[0] - other[1:].mean()),
            "contrast_low": contrast_low,
            "contrast_high": contrast_high,
            "above": bool(low > 0),
            "selective": bool(contrast_low > 0),
            "decided": is_own.sum() >= ENOUGH
            and (is_other.sum() >= ENOUGH or not is_other.any())
            and all(abs(x.mean()) > EARLY * x.std() for x in (excess, contrast) if np.isfinite(x).all()),
            "draws": len(draws),
            "p": p_value(excess),
            "contrast_p": p_value(contrast),
            "detectable": DETECTABLE * excess.std(),
        })  # fmt: skip
    found = pl.DataFrame(rows, schema=_CONTROL)
    return found.with_columns(pl.Series(f"{name}_holm", holm(found[name].to_numpy())) for name in ("p", "contrast_p"))


def p_value(resampled: Floats) -> float:
    """The two-sided p-value of a difference of 0, from bootstrap resamples of the difference, `[resamples]`.

    `min(1, 2 (1 + k) / (1 + resamples))`, k being the number of resamples at or below 0 or that of those at or above
    0, whichever is smaller: the level at which the percentile interval starts to include 0 (Efron and Tibshirani 1993,
    section 15.4). The 1 is for the observed sample (Davison and Hinkley 1997, section 4.2), so no p is 0: the smallest
    is `2 / (1 + resamples)`. NaN if a resample is.
    """
    if np.isnan(resampled).any():
        return float("nan")
    tail = min((resampled <= 0).sum(), (resampled >= 0).sum())
    return min(1.0, float(2 * (1 + tail) / (1 + len(resampled))))


def holm(p: Floats) -> Floats:
    """The p-values after Holm's correction (Holm 1979), `[tests]`, in the order of `p`.

    The i-th smallest of m becomes the largest of `(m - j + 1) p_j` over `j <= i`, at most 1. Rejecting all below a
    level then has at most that probability of any false rejection, however the tests depend on each other. NaN stays
    NaN and does not count as a test.
    """
    order = np.argsort(p, kind="stable")[: len(p) - int(np.isnan(p).sum())]  # NaN is last
    adjusted = np.full(len(p), np.nan)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)), 1.0)
    return adjusted


def means(
    change: Floats, tokens: NDArray[np.int64], resamples: int, random: np.random.Generator
) -> tuple[Floats, Floats]:
    """`sum change / sum tokens` of the texts, `[conditions]`, and of resamples of them, `[conditions, resamples]`."""
    count, texts = tokens.astype(np.float64), len(tokens)
    if not count.sum():
        return np.full(len(change), np.nan), np.full((len(change), resamples), np.nan)
    weight = random.multinomial(texts, np.full(texts, 1 / texts), size=resamples).astype(np.float64)
    return change.sum(axis=1) / count.sum(), (change @ weight.T) / np.maximum(weight @ count, 1.0)
