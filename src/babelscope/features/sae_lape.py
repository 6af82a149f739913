"""SAE-LAPE: which features of a sparse autoencoder belong to which language."""

from typing import Literal

import polars as pl

from babelscope.core.errors import UserError
from babelscope.features import rates
from babelscope.features.rates import Counts

Order = Literal["entropy", "probability"]


def sae_lape(
    counts: Counts,
    totals: pl.DataFrame,
    *,
    example_rate: float,
    token_rate: float,
    ratio: float,
    members: int | None = 1,
    max_entropy: float | None = None,
    same_language: bool = False,
    order: Order = "entropy",
    top: int | None = None,
    per_layer: bool = False,
) -> pl.DataFrame:
    """Select the units that belong to exactly `members` languages (Andrylie et al. 2025, arXiv 2507.11230).

    With T(l) tokens and N(l) texts of a language l, c(l, u) tokens on which unit u fires, e(l, u) texts in which it
    fires, and P(l, u) = c / T:

    1. Candidates: e >= int(example_rate * N) in some language and c > int(token_rate * T) in some language (the same
       one if `same_language`). Both limits are truncated, as in the paper's code; that of e is at least 1, since
       otherwise every unit would pass in a language of a single text. If `example_rate` is 0 or `counts` has no
       `texts`, the first condition is omitted.
    2. Members of u: the languages with P >= ratio * max_l P. Units with exactly `members` of them are selected: 1 gives
       language-specific features, k those shared by k languages (a row for each), None every candidate.
       Units whose entropy H(u) = -sum_l P' ln P', P' = P / sum_l P (natural logarithm), is above `max_entropy` are left
       out; exp(H) is the number of effective languages of a unit.
    3. Rank within a language: by H(u), ascending, or by P(l, u), descending. Ties break by (layer, unit).

    Parameters
    ----------
    counts: `layer`, `unit`, `language`, `tokens` and, if known, `texts`, `hookpoint`; one row per unit and
        language, rows without a firing may be missing. With `hookpoint`, a unit is (hookpoint, layer, unit). A lazy
        frame is read one layer at a time.
    totals: `language`, `tokens` and, if `counts` has it, `texts`: one row per language. The result has the same
        order of languages.
    example_rate, token_rate: shares of texts and of tokens, 0 to 1. Paper: 0.98 and 0.1.
    ratio: share of the highest probability, above 0, at most 1. Paper: 0.5.
    members, same_language, order: see above. Paper: 1, False, entropy.
    max_entropy: nats, at least 0, rounded to 12 decimals like H(u); None: no limit.
    top: units to keep per language (or per language and layer); None keeps all.
    per_layer: rank and cut within each layer.

    Returns
    -------
    `language`, (`hookpoint`,) `layer`, `unit`, `probability` (P(l, u)), `entropy` (nats), `members`, `rank` (from 1),
    sorted by language, (layer if `per_layer`,) rank. A language without units has no row here; `summary` names it.

    Raises
    ------
    UserError: an argument is out of range, a column is missing, a language has no total, or a unit has two rows for
        one language.
    """
    _check(example_rate, token_rate, ratio, members, max_entropy, order, top)
    rates.require(counts, ["layer", "unit", "language", "tokens"], "counts")
    texts = ["texts"] if "texts" in rates.columns(counts) else []
    totals = rates.check_totals(totals, *texts)
    limits = _limits(totals, example_rate, token_rate)
    key = rates.unit_key(counts)
    parts = []
    for rows in rates.by_layer(counts, [*key, "language", "tokens", *texts]):
        rows = _candidates(rows, limits, key, same_language)
        rates.check_once(rows, key)
        parts.append(_belonging(rates.probabilities(rows, totals), key, ratio, members, max_entropy))
    return _ranked(pl.concat(parts), totals, key, order, top, per_layer)


def summary(features: pl.DataFrame, languages: list[str]) -> pl.DataFrame:
    """One row for each of `languages`, also for those that own no unit.

    Returns
    -------
    `language`, `units` (how many rows of `features` it has), `mean_entropy` (nats), `mean_probability` (both None for
    a language without units).
    """
    owned = features.group_by("language", maintain_order=True).agg(
        units=pl.len().cast(pl.Int64),
        mean_entropy=pl.col("entropy").mean(),
        mean_probability=pl.col("probability").mean(),
    )
    every = pl.DataFrame({"language": languages}, schema={"language": pl.String})
    return every.join(owned, on="language", how="left", maintain_order="left").with_columns(
        pl.col("units").fill_null(0)
    )


def _check(
    example_rate: float, token_rate: float, ratio: float, members: int | None, max_entropy: float | None, order: str,
    top: int | None,
) -> None:  # fmt: skip
    rates.check_shares(example_rate=example_rate, token_rate=token_rate)
    if not 0 < ratio <= 1:  # at 0 every language would be a member of every unit
        raise UserError(f"ratio: {ratio} is not above 0 and at most 1")
    if members is not None and members < 1:
        raise UserError(f"members: {members} is not at least 1")
    if max_entropy is not None and not max_entropy >= 0:
        raise UserError(f"max_entropy: {max_entropy} is not at least 0 nats (none: no limit)")
    if order not in ("entropy", "probability"):
        raise UserError(f"order: {order!r}; allowed: entropy, probability")
    if top is not None and top < 1:
        raise UserError(f"top: {top} is not at least 1 (none keeps all)")


def _limits(totals: pl.DataFrame, example_rate: float, token_rate: float) -> pl.DataFrame:
    """The limits per language, `int(rate * total)` as in the paper's code; with an `example_rate`, at least 1 text."""
    limits = {"language": totals["language"].to_list(), "_tokens": [int(token_rate * n) for n in totals["tokens"]]}
    if "texts" in totals.columns:
        limits["_texts"] = [max(int(example_rate > 0), int(example_rate * n)) for n in totals["texts"]]
    return pl.DataFrame(limits, schema_overrides=dict.fromkeys(list(limits)[1:], pl.Int64))


def _candidates(rows: pl.DataFrame, limits: pl.DataFrame, key: list[str], same_language: bool) -> pl.DataFrame:
    """All rows of the units that meet the limits."""
    rows = rates.join_totals(rows, limits)
    conditions = [pl.col("tokens") > pl.col("_tokens")]
    if "_texts" in limits.columns:
        in_texts = pl.col("texts") >= pl.col("_texts")
        if same_language:
            conditions = [conditions[0] & in_texts]
        elif limits["_texts"].min() != 0:  # a unit without a row for a language meets a limit of 0
            conditions.append(in_texts)
    for condition in conditions:
        rows = rows.join(rows.filter(condition).select(key), on=key, how="semi")
    return rows.drop("_tokens", "_texts", strict=False)


def _belonging(
    rows: pl.DataFrame, key: list[str], ratio: float, members: int | None, max_entropy: float | None
) -> pl.DataFrame:
    """The rows (unit, member language) of the units with exactly `members` member languages; None: with any number.

    Without the units above `max_entropy`.
    """
    units = rates.entropies(rows, key)
    if max_entropy is not None:
        units = units.filter(pl.col("entropy") <= round(max_entropy, rates.DECIMALS))
    return (
        rows.join(units, on=key)
        .filter(pl.col("probability") >= ratio * pl.col("peak"))
        .with_columns(members=pl.len().over(key).cast(pl.Int64))
        .filter(True if members is None else pl.col("members") == members)
        .select("language", *key, "probability", "entropy", "members")
    )


def _ranked(
    features: pl.DataFrame, totals: pl.DataFrame, key: list[str], order: Order, top: int | None, per_layer: bool
) -> pl.DataFrame:
    """`features` sorted and cut, with `rank`, counted from 1."""
    within = ["_position", "layer"] if per_layer else ["_position"]
    by = pl.col("entropy") if order == "entropy" else -pl.col("probability")
    ranked = (
        features.join(totals.select("language").with_row_index("_position"), on="language", how="left")
        .sort(*within, by, *rates.tie_break(key))
        .with_columns(rank=pl.int_range(1, pl.len() + 1, dtype=pl.Int64).over(within))
        .drop("_position")
    )
    return ranked if top is None else ranked.filter(pl.col("rank") <= top)
