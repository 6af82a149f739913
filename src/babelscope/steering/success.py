"""Whether steering worked: judgement of every generated text, and figures by language and strength."""

from collections.abc import Mapping

import polars as pl


def judge(generations: pl.DataFrame, labels: Mapping[str, str], min_distinct: float, max_nll: float) -> pl.DataFrame:
    """`generations` with `success`: the text is in the amplified language and not degenerate.

    Parameters
    ----------
    generations: `language` (amplified; null: none), `predicted`, `nll`, `distinct_2`.
    labels: the right value of `predicted` by language; the success of other languages is null.
    min_distinct: texts with a lower distinct-2 are degenerate.
    max_nll: texts with a higher NLL under the unsteered model (nats per token) are degenerate.
    """
    wanted = pl.col("language").replace_strict(dict(labels), default=None, return_dtype=pl.String)
    success = (pl.col("predicted") == wanted) & _fluent(min_distinct, max_nll)
    return generations.with_columns(success=pl.when(wanted.is_not_null()).then(success))


def _fluent(min_distinct: float, max_nll: float) -> pl.Expr:
    return (pl.col("distinct_2") >= min_distinct) & (pl.col("nll") <= max_nll)


def figures(judged: pl.DataFrame, labels: Mapping[str, str], min_distinct: float, max_nll: float) -> dict[str, float]:
    """Success and fluency per language at its best strength, and over all languages per strength.

    The best strength has the highest success, then the lowest NLL; it is chosen on the prompts that it is reported on.

    Parameters
    ----------
    judged: `language` (null: unsteered), `strength`, `control` (null: the language's own units), `predicted`, `nll`,
        `distinct_2`, `success`.
    labels, min_distinct, max_nll: as in `judge`.

    Returns
    -------
    `success`, `called` (in the language, degenerate or not), `nll`, `distinct_2`, `strength` of each `/<language>`;
    `success_unsteered/<language>` and, with a control, `success_control/<language>` at the same strength;
    `success_at/<strength>`, `nll_at/<strength>`; the means `success`, `success_unsteered`, `success_control`;
    `nll_unsteered`, `distinct_2_unsteered`.
    """
    is_control = pl.col("control").is_not_null()
    own = judged.drop_nulls(["language", "success"]).filter(~is_control)
    unsteered = judged.filter(pl.col("language").is_null())
    called = pl.col("predicted") == pl.col("language").replace_strict(dict(labels), default=None)
    means = (pl.col("success").mean(), called.mean().alias("called"), pl.col("nll").mean(), pl.col("distinct_2").mean())
    table = own.group_by("language", "strength", maintain_order=True).agg(*means)
    best = table.sort("success", -pl.col("nll"), descending=True, maintain_order=True)
    numbers: dict[str, float] = {}
    for row in best.unique("language", keep="first", maintain_order=True).iter_rows(named=True):
        name = row.pop("language")
        fluent = unsteered.filter(_fluent(min_distinct, max_nll))
        row["success_unsteered"] = fluent.filter(predicted=labels[name]).height / max(unsteered.height, 1)
        control = judged.filter(is_control, language=name, strength=row["strength"])
        if len(control):
            row["success_control"] = control["success"].mean()
        numbers |= {f"{key}/{name}": float(value) for key, value in row.items()}
    for key in ("success", "success_unsteered", "success_control"):
        values = [value for name, value in numbers.items() if name.startswith(f"{key}/")]
        numbers |= {key: sum(values) / len(values)} if values else {}
    for strength, success, nll in own.group_by("strength").agg(pl.mean("success", "nll")).sort("strength").iter_rows():
        numbers |= {f"success_at/{strength:g}": success, f"nll_at/{strength:g}": nll}
    if len(unsteered):
        numbers |= {f"{key}_unsteered": float(unsteered[key].sum()) / len(unsteered) for key in ("nll", "distinct_2")}
    return numbers
