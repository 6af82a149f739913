"""What the report is given, and the small frames behind its pictures: filled grids in the order of params.yaml."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import polars as pl

from babelscope.config.schema import primary_method
from babelscope.core.errors import UserError
from babelscope.models.names import parts_of
from babelscope.report.relatives import relatives

FEATURE_COLUMNS = ("kind", "hookpoint", "layer", "unit", "language", "probability", "entropy", "rank")
CONTROL_COLUMNS = ("method", "language", *(
    f"{name}{end}" for name in ("excess", "contrast") for end in ("", "_low", "_high")
))  # fmt: skip
CONFUSION_COLUMNS = ("method", "normalize", "language", "predicted", "texts")
SIMILARITY_COLUMNS = ("language", "other", "units", "jaccard")
GENERATION_COLUMNS = ("language", "strength", "control", "nll", "distinct_2", "success")
NLL_COLUMNS = ("method", "kind", "ablated", "control", "evaluated", "nll", "tokens", "delta", "low", "high")


@dataclass(frozen=True)
class ReportInputs:
    """Everything that the page shows. Frames follow the contracts of `data/scores`, `data/ablation` and so on.

    Parameters
    ----------
    params: the sections of params.yaml that decide the results (no `hardware`), shown as YAML; `languages` and
        `hookpoints` set the order of rows and columns.
    features: `data/scores/features.parquet`; a language without units has no row, or one with a null unit.
    nll: `data/ablation/nll.parquet`, in nats/token.
    by_layer: `data/ablation/by_layer.parquet` (each hookpoint ablated alone), or None.
    metrics: `metrics/<name>.json` by `<name>`; any key may be missing.
    files: MD5 of the input files by path.
    versions: version by package.
    control: `data/ablation/control.parquet`, or None.
    confusion: `data/identify/confusion.parquet`, or None.
    generations: `data/steer/generations.parquet`, or None.
    similarity: `data/scores/similarity.parquet`, or None.
    """

    params: Mapping[str, Any]
    features: pl.DataFrame
    nll: pl.DataFrame
    by_layer: pl.DataFrame | None
    metrics: Mapping[str, Mapping[str, Any]]
    files: Mapping[str, str]
    versions: Mapping[str, str]
    control: pl.DataFrame | None = None
    confusion: pl.DataFrame | None = None
    generations: pl.DataFrame | None = None
    similarity: pl.DataFrame | None = None

    def __post_init__(self) -> None:
        _require("features.parquet", self.features, FEATURE_COLUMNS)
        _require("nll.parquet", self.nll, NLL_COLUMNS)
        if self.by_layer is not None:
            _require("by_layer.parquet", self.by_layer, (*NLL_COLUMNS, "hookpoint"))
        if self.control is not None:
            _require("control.parquet", self.control, CONTROL_COLUMNS)
        if self.confusion is not None:
            _require("confusion.parquet", self.confusion, CONFUSION_COLUMNS)
        if self.generations is not None:
            _require("generations.parquet", self.generations, GENERATION_COLUMNS)
        if self.similarity is not None:
            _require("similarity.parquet", self.similarity, SIMILARITY_COLUMNS)

    @property
    def languages(self) -> list[str]:
        """The languages, in the order of params.yaml."""
        return list(self.params["languages"])

    @property
    def hookpoints(self) -> list[str]:
        """The hookpoints, in the order of params.yaml."""
        return list(self.params["hookpoints"])

    def figure(self, name: str, key: str) -> Any:
        """The figure `key` of `metrics/<name>.json`, or None where there is none."""
        return self.metrics.get(name, {}).get(key)


def _require(file: str, frame: pl.DataFrame, columns: tuple[str, ...]) -> None:
    missing = [name for name in columns if name not in frame.columns]
    if missing:
        raise UserError(f"{file}: no column {', '.join(missing)}; the columns are {', '.join(frame.columns)}")


def layer_labels(hookpoints: list[str]) -> dict[str, str]:
    """Short names for an axis: the layer's number where it tells the hookpoints apart, else the whole name."""
    found = {name: parts_of(name) for name in hookpoints}
    numbers = {name: str(parts[0]) for name, parts in found.items() if parts is not None}
    return numbers if len(set(numbers.values())) == len(hookpoints) else {name: name for name in hookpoints}


def _grid(inputs: ReportInputs) -> pl.DataFrame:
    """Every (language, hookpoint) pair in the order of params.yaml, with the axis label `layer`."""
    labels = pl.DataFrame({"hookpoint": inputs.hookpoints, "layer": list(layer_labels(inputs.hookpoints).values())})
    return pl.DataFrame({"language": inputs.languages}).join(labels, how="cross", maintain_order="left_right")


def features(inputs: ReportInputs) -> pl.DataFrame:
    """The SAE features of the languages and hookpoints that params.yaml lists, by language and rank."""
    languages = pl.Enum(inputs.languages)
    return (
        inputs.features.filter(
            pl.col("kind") == "sae",
            pl.col("unit").is_not_null(),
            pl.col("language").is_in(inputs.languages),
            pl.col("hookpoint").is_in(inputs.hookpoints),
        )
        .with_columns(pl.col("language").cast(languages))
        .sort("language", "rank", "hookpoint", "unit")
        .with_columns(pl.col("language").cast(pl.String))
    )


def found(inputs: ReportInputs) -> int:
    """How many features there are; one that several languages share counts once."""
    return features(inputs).select("hookpoint", "unit").unique().height


def counts(inputs: ReportInputs) -> pl.DataFrame:
    """`language`, `hookpoint`, `layer` (label), `value` (features): the whole grid, 0 where there is no feature."""
    owned = features(inputs).group_by("language", "hookpoint").agg(value=pl.len().cast(pl.Int64))
    grid = _grid(inputs).join(owned, on=["language", "hookpoint"], how="left", maintain_order="left")
    return grid.with_columns(pl.col("value").fill_null(0))


def ablation_method(inputs: ReportInputs) -> str:
    """The method that the page shows: that of the unprefixed figures in `metrics/ablate.json`."""
    return str(inputs.figure("ablate", "primary_method") or primary_method(sorted(set(inputs.nll["method"]) - {None})))


def _method(inputs: ReportInputs, frame: pl.DataFrame) -> pl.DataFrame:
    """The rows of `ablation_method`; what is not a number becomes null."""
    frame = frame.with_columns(pl.col("delta", "low", "high").cast(pl.Float64).fill_nan(None))
    return frame.filter(pl.col("method") == ablation_method(inputs))


def matrix(inputs: ReportInputs) -> pl.DataFrame:
    """The cells of dNLL[ablated, evaluated], in nats/token, for the real sets of features.

    Returns
    -------
    `ablated`, `evaluated`, `value` (dNLL), `low`, `high` (95 %), `tokens`, `own` (on the diagonal), `largest` (of its
    row), in the order of params.yaml; a language that was not ablated has no row.
    """
    languages = pl.Enum(inputs.languages)
    cells = _method(inputs, inputs.nll).filter(
        pl.col("control").is_null(),
        pl.col("ablated").is_in(inputs.languages),
        pl.col("evaluated").is_in(inputs.languages),
    )
    return (
        cells.select(pl.col("ablated", "evaluated").cast(languages), "tokens", "low", "high", value="delta")
        .sort("ablated", "evaluated")
        .with_columns(pl.col("ablated", "evaluated").cast(pl.String))
        .with_columns(
            own=pl.col("ablated") == pl.col("evaluated"),
            # A row of zeros (nothing was ablated) has no largest cell.
            largest=(pl.col("value") == pl.col("value").max().over("ablated")) & (pl.col("value") > 0),
        )
    )


def clean(inputs: ReportInputs) -> pl.DataFrame:
    """`evaluated`, `nll` (nats/token), `tokens` of the run in which nothing is ablated."""
    # The clean run may carry a method of its own, so the method is not asked for.
    rows = inputs.nll.filter(pl.col("ablated").is_null(), pl.col("evaluated").is_in(inputs.languages))
    return rows.select("evaluated", "nll", "tokens").unique("evaluated", keep="first", maintain_order=True)


def own_and_others(inputs: ReportInputs) -> pl.DataFrame:
    """What ablating each language's features does to it, to the others, and what as many random features do to it.

    Returns
    -------
    One row per language in the order of params.yaml: `language`, `own`, `low`, `high` (its diagonal cell and 95 %
    interval), `others` (mean over the other languages), `others_low`, `others_high` (the least and the largest of
    them), `random` (mean over the control draws); nats/token, null where there is no such run.
    """
    cells = matrix(inputs)
    own = cells.filter("own").select("low", "high", language="ablated", own="value")
    others = (
        cells.filter(~pl.col("own"))
        .group_by("ablated", maintain_order=True)
        .agg(others=pl.col("value").mean(), others_low=pl.col("value").min(), others_high=pl.col("value").max())
    )
    control = (
        _method(inputs, inputs.nll)
        .filter(pl.col("control").is_not_null(), pl.col("ablated") == pl.col("evaluated"))
        .group_by("ablated", maintain_order=True)
        .agg(random=pl.col("delta").mean())
    )
    result = pl.DataFrame({"language": inputs.languages})
    for part, key in ((own, "language"), (others, "ablated"), (control, "ablated")):
        result = result.join(part, left_on="language", right_on=key, how="left", maintain_order="left")
    return result


def own_by_layer(inputs: ReportInputs) -> pl.DataFrame:
    """What ablating each language's features at one hookpoint alone does to it and to the others.

    Returns
    -------
    The whole grid, `language`, `hookpoint`, `layer`: `value` (own dNLL), `low`, `high` (its 95 % interval), `others`
    (mean over the other languages), `others_high` (the largest of them); nats/token, null where there was no run.
    Empty without such runs.
    """
    if inputs.by_layer is None or inputs.by_layer.is_empty():
        return pl.DataFrame()
    cells = _method(inputs, inputs.by_layer).filter(pl.col("control").is_null(), pl.col("ablated").is_not_null())
    own = cells.filter(pl.col("ablated") == pl.col("evaluated"))
    others = (
        cells.filter(pl.col("ablated") != pl.col("evaluated"))
        .group_by("ablated", "hookpoint", maintain_order=True)
        .agg(others=pl.col("delta").mean(), others_high=pl.col("delta").max())
    )
    own = own.join(others, on=["ablated", "hookpoint"], how="left", maintain_order="left")
    own = own.select("hookpoint", "low", "high", "others", "others_high", language="ablated", value="delta")
    return _grid(inputs).join(own, on=["language", "hookpoint"], how="left", maintain_order="left")


def by_hookpoint(frame: pl.DataFrame) -> pl.DataFrame:
    """`own_by_layer` summed up over the languages: how selective each hookpoint is alone.

    Returns
    -------
    One row per hookpoint: `hookpoint`, `layer`, `own`, `others` (means over the languages with a run; null where there
    are none), `rows` (languages that lose more than any other does; null where no other was evaluated).
    """
    ahead = (pl.col("value") > pl.col("others_high")) & (pl.col("value") > 0)
    return frame.group_by("hookpoint", "layer", maintain_order=True).agg(
        own=pl.col("value").mean(),
        others=pl.col("others").mean(),
        rows=pl.when(pl.col("others_high").count() > 0).then(ahead.sum()),
    )


def against_control(inputs: ReportInputs) -> pl.DataFrame:
    """Each language's own features against random ones that fire as often on it.

    Returns
    -------
    One row per language in the order of params.yaml and `question`: `language`, `question` ("own" or "selective"),
    `value`, `low`, `high` (95 %), nats/token; null where there is no control. Empty without any.
    """
    if inputs.control is None or inputs.control.is_empty():
        return pl.DataFrame()
    mine = inputs.control.filter(pl.col("method") == ablation_method(inputs))
    parts = [
        mine.select("language", pl.lit(question).alias("question"), value=name, low=f"{name}_low", high=f"{name}_high")
        for question, name in (("own", "excess"), ("selective", "contrast"))
    ]
    grid = pl.DataFrame({"language": inputs.languages}).join(
        pl.DataFrame({"question": ["own", "selective"]}), how="cross", maintain_order="left_right"
    )
    return grid.join(pl.concat(parts), on=["language", "question"], how="left", maintain_order="left")


def confusion(inputs: ReportInputs) -> pl.DataFrame:
    """Which language held-out texts were taken for, by the features' firings and by fastText.

    Returns
    -------
    `method` ("features" or "fastText"), `language`, `predicted`, `texts`, `value` (share of the language's texts), in
    the order of params.yaml. The features' method is the firings, normalised by the units owned, of the first kind
    that there is. Empty without a confusion matrix.
    """
    if inputs.confusion is None:
        return pl.DataFrame()
    shown = {"features": [("sae-count", "units"), ("neuron-count", "units")], "fastText": [("fasttext", "none")]}
    order = pl.Enum(inputs.languages)
    parts = []
    for label, candidates in shown.items():
        found = [inputs.confusion.filter(method=method, normalize=normalize) for method, normalize in candidates]
        parts += [rows.with_columns(method=pl.lit(label)) for rows in found if len(rows)][:1]
    if not parts:
        return pl.DataFrame()
    return (
        pl.concat(parts)
        .filter(pl.col("language").is_in(inputs.languages), pl.col("predicted").is_in(inputs.languages))
        .with_columns(pl.col("language", "predicted").cast(order), value=_share("texts", ["method", "language"]))
        .sort(pl.col("method").cast(pl.Enum(list(shown))), "language", "predicted")
        .with_columns(pl.col("language", "predicted").cast(pl.String))
        .select("method", "language", "predicted", "texts", "value")
    )


def unidentified(inputs: ReportInputs) -> list[str]:
    """The languages whose texts identification leaves out, since fastText does not know them or tell them apart."""
    there = set() if inputs.confusion is None else set(inputs.confusion["language"])
    return [name for name in inputs.languages if there and name not in there]


def similarity(inputs: ReportInputs) -> pl.DataFrame:
    """How alike the languages' features are, those that are most alike side by side.

    Returns
    -------
    `language`, `other`, `units`, `value` (Jaccard index; null on the diagonal), `label`, `other_label` (with branch and
    script where known), `expected` ("same branch", "same script", "neither", null where not known) in the order of the
    leaves of an average-linkage tree over 1 - Jaccard (optimal leaf order; Bar-Joseph et al. 2001). Empty with fewer
    than three languages.
    """
    if inputs.similarity is None or len(inputs.languages) < 3:
        return pl.DataFrame()
    languages = inputs.languages
    pairs = inputs.similarity.filter(pl.col("language").is_in(languages), pl.col("other").is_in(languages))
    order = _side_by_side(pairs, languages)
    known = {name: relatives(name) for name in languages}
    label = {name: f"{name} ({', '.join(kin)})" if (kin := known[name]) else name for name in languages}

    def expected(row: tuple[str, str]) -> str | None:
        first, second = (known[name] for name in row)
        if first is None or second is None:
            return None
        return "same branch" if first[0] == second[0] else "same script" if first[1] == second[1] else "neither"

    ranked = pairs.with_columns(pl.col("language", "other").cast(pl.Enum(order))).sort("language", "other")
    ranked = ranked.with_columns(pl.col("language", "other").cast(pl.String))
    relation = [expected(row) for row in ranked.select("language", "other").rows()]
    return ranked.with_columns(
        value=pl.when(pl.col("language") != pl.col("other")).then(pl.col("jaccard")),
        label=pl.col("language").replace_strict(label, return_dtype=pl.String),
        other_label=pl.col("other").replace_strict(label, return_dtype=pl.String),
        expected=pl.Series(relation, dtype=pl.String),
    ).drop("jaccard")


def _side_by_side(pairs: pl.DataFrame, languages: list[str]) -> list[str]:
    """The languages in the order of the leaves of a tree over their distances."""
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    known = {(a, b): value for a, b, value in pairs.select("language", "other", "jaccard").rows()}
    distance = [[0.0 if a == b else 1.0 - (known.get((a, b)) or 0.0) for b in languages] for a in languages]
    tree = linkage(squareform(distance), method="average", optimal_ordering=True)
    return [languages[leaf] for leaf in leaves_list(tree)]


def likeness(inputs: ReportInputs) -> dict[str, float]:
    """Mean Jaccard index of the pairs of languages of the same branch, of the same script only, and of neither."""
    frame = similarity(inputs)
    if frame.is_empty():
        return {}
    means = frame.filter(pl.col("value").is_not_null()).group_by("expected").agg(pl.col("value").mean())
    found = {key: value for key, value in means.iter_rows() if key is not None}
    return {key: found[key] for key in ("same branch", "same script", "neither") if key in found}


def _share(column: str, within: list[str]) -> pl.Expr:
    total = pl.col(column).sum().over(within)
    return pl.when(total > 0).then(pl.col(column) / total)


def steering(inputs: ReportInputs) -> pl.DataFrame:
    """Success and fluency of steered text, per language and strength.

    Returns
    -------
    `language`, `strength`, `success` (share of the texts that are in the language and not degenerate), `nll`
    (nats/token under the unsteered model), `distinct_2`; strength 0 is the unsteered model, whose text is the same for
    all languages. In the order of params.yaml and by strength; empty without generated text.
    """
    if inputs.generations is None or inputs.generations.is_empty():
        return pl.DataFrame()
    rows = inputs.generations.filter(pl.col("control").is_null())
    means = [pl.col("success").mean(), pl.col("nll").mean(), pl.col("distinct_2").mean()]
    steered = rows.filter(pl.col("language").is_in(inputs.languages)).group_by("language", "strength").agg(means)
    plain = rows.filter(pl.col("language").is_null()).select(means[1:])
    none = pl.DataFrame({
        "language": inputs.languages,
        "strength": 0.0,
        "success": [inputs.figure("steer", f"success_unsteered/{name}") for name in inputs.languages],
        "nll": plain["nll"].item(),
        "distinct_2": plain["distinct_2"].item(),
    }, schema=steered.schema)  # fmt: skip
    languages = pl.Enum(inputs.languages)
    both = pl.concat([none.filter(pl.lit(plain["nll"].item() is not None)), steered])
    return both.sort(pl.col("language").cast(languages), "strength")


def fvu_by_language(inputs: ReportInputs) -> pl.DataFrame:
    """Fraction of variance unexplained: `language`, `hookpoint`, `layer`, `value`; empty without such figures."""
    grid = _grid(inputs)
    values = [inputs.figure(f"train.{h}", f"fvu/{lang}") for lang, h in grid.select("language", "hookpoint").rows()]
    if all(value is None for value in values):
        return pl.DataFrame()
    return grid.with_columns(pl.Series("value", values, dtype=pl.Float64))


def mean_fvu(inputs: ReportInputs) -> float | None:
    """The mean over the hookpoints of the SAEs' FVU, or None where none is known."""
    values = [inputs.figure(f"train.{name}", "fvu") for name in inputs.hookpoints]
    known = [float(value) for value in values if value is not None]
    return sum(known) / len(known) if known else None
