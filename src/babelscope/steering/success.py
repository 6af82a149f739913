"""Whether steering worked: judgement of every generated text, and figures by language and strength."""

from collections.abc import Mapping

import polars as pl


def judge(generations: pl.DataFrame, labels: Mapping[str, str], min_distinct: float, max_nll: float) -> pl.DataFrame:
    """`generations` with `success`: in the language that was amplified, and not degenerate.

    Parameters
    ----------
    generations: `language` (amplified; null: none), `predicted`, `nll`, `distinct_2`.
    labels: what `predicted` must be, by language; a language that is missing here cannot be judged: null.
    min_distinct, max_nll: distinct-2 at least, nats per token under the unsteered model at most.
    """
    wanted = pl.col("language").replace_strict(dict(labels), default=None, return_dtype=pl.String)
    fluent = (pl.col("distinct_2") >= min_distinct) & (pl.col("nll") <= max_nll)
    return generations.with_columns(
        success=(pl.col("predicted") == wanted) & fluent & wanted.is_not_null()
    ).with_columns(success=pl.when(wanted.is_not_null()).then(pl.col("success")))


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
    `success_at/<strength>`, `nll_at/<strength>`; the means `success`, `success_unsteered`, `success_control`.
    """
    own = judged.filter(pl.col("language").is_not_null(), pl.col("control").is_null(), pl.col("success").is_not_null())
    plain, control = judged.filter(pl.col("language").is_null()), judged.filter(pl.col("control").is_not_null())
    called = pl.col("predicted") == pl.col("language").replace_strict(dict(labels), default=None)
    means = (pl.col("success").mean(), called.mean().alias("called"), pl.col("nll").mean(), pl.col("distinct_2").mean())
    table = own.group_by("language", "strength", maintain_order=True).agg(*means)
    best = table.sort("success", -pl.col("nll"), descending=True, maintain_order=True).unique(
        "language", keep="first", maintain_order=True
    )
    numbers: dict[str, float] = {}
    unsteered, controls = [], []
    for row in best.iter_rows(named=True):
        name = row.pop("language")
        numbers |= {f"{key}/{name}": float(value) for key, value in row.items()}
        fluent = (plain["distinct_2"] >= min_distinct) & (plain["nll"] <= max_nll)
        unsteered.append(float(((plain["predicted"] == labels[name]) & fluent).sum()) / max(len(plain), 1))
        numbers[f"success_unsteered/{name}"] = unsteered[-1]
        there = control.filter(pl.col("language") == name, pl.col("strength") == row["strength"])["success"]
        if len(there):
            controls.append(float(there.sum()) / len(there))
            numbers[f"success_control/{name}"] = controls[-1]
    for strength, success, nll in (
        own.group_by("strength").agg(pl.mean("success"), pl.mean("nll")).sort("strength").iter_rows()
    ):
        numbers |= {f"success_at/{strength:g}": success, f"nll_at/{strength:g}": nll}
    if len(best):
        numbers |= {
            "success": float(best["success"].sum()) / len(best),
            "success_unsteered": sum(unsteered) / len(best),
        }
    if controls:
        numbers["success_control"] = sum(controls) / len(controls)
    if len(plain):
        numbers |= {"nll_unsteered": float(plain["nll"].sum()) / len(plain),
                    "distinct_2_unsteered": float(plain["distinct_2"].sum()) / len(plain)}  # fmt: skip
    return numbers
