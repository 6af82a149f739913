"""The tables and figures of an ablation run."""

from collections.abc import Sequence

import polars as pl

from babelscope.ablation.ablate import TextNLL
from babelscope.ablation.conditions import Conditions
from babelscope.ablation.selectivity import against_control, cells, selectivity
from babelscope.models.hookpoints import layer_of

COLUMNS = ["method", "kind", "ablated", "control", "evaluated", "nll", "tokens", "delta", "low", "high"]


def table(
    nll: TextNLL,
    what: Conditions,
    method: str,
    language: Sequence[str],
    languages: Sequence[str],
    resamples: int,
    seed: int,
) -> pl.DataFrame:
    """Every cell of one method: `COLUMNS`, `hookpoint` (null: all), `layer`; `ablated` is null in the clean run.

    Parameters
    ----------
    nll: what was measured, under the conditions `what` and by `method`.
    language: of each text.
    languages: the order of the rows within a condition.
    resamples, seed: of the bootstrap, see `cells`.
    """
    found = cells(nll.clean.numpy(), nll.ablated.numpy(), nll.tokens.numpy(), language, resamples, seed)
    return (
        found.join(what.keys, on="condition", how="left", maintain_order="left")
        .with_columns(
            method=pl.lit(method),
            kind=pl.lit("neuron" if method == "neuron" else "sae"),
            layer=pl.col("hookpoint").map_elements(layer_of, return_dtype=pl.Int32),
        )
        # What a control does to others is known from few of their texts: it makes no cell.
        .filter(pl.col("control").is_null() | (pl.col("ablated") == pl.col("evaluated")))
        .sort("condition", pl.col("evaluated").cast(pl.Enum(languages)))
        .select(*COLUMNS, "hookpoint", "layer")
    )


def control(
    nll: TextNLL,
    what: Conditions,
    method: str,
    language: Sequence[str],
    languages: Sequence[str],
    resamples: int,
    seed: int,
) -> pl.DataFrame:
    """The own units of every language against its controls: `method` and what `against_control` returns.

    Parameters
    ----------
    As of `table`.
    """
    change = (nll.ablated - nll.clean).numpy()
    keys = what.keys.filter(pl.col("hookpoint").is_null())
    found = against_control(change, nll.tokens.numpy(), language, keys, languages, resamples, seed)
    return found.select(pl.lit(method).alias("method"), pl.all())


def figures(found: pl.DataFrame, controls: pl.DataFrame, languages: Sequence[str]) -> dict[str, float]:
    """What `table` and `control` come to, by flat key.

    See `selectivity`; `rows_above_zero`: in how many rows the 95 % interval of the diagonal lies above 0;
    `nll_clean/<language>`.
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
        numbers["control"] = float(controls["control"].mean())  # type: ignore[arg-type]
        for name, mean, upper in controls.select("language", "control", "control_high").iter_rows():
            numbers |= {f"control/{name}": mean, f"control_high/{name}": upper}
    alone = found.filter(pl.col("hookpoint").is_not_null())
    own = alone.filter(pl.col("ablated") == pl.col("evaluated")).group_by("hookpoint", maintain_order=True)
    others = alone.filter(pl.col("ablated") != pl.col("evaluated")).group_by("hookpoint", maintain_order=True)
    numbers |= {f"own_alone/{name}": value for name, value in own.agg(pl.col("delta").mean()).iter_rows()}
    return numbers | {f"others_alone/{name}": value for name, value in others.agg(pl.col("delta").mean()).iter_rows()}
