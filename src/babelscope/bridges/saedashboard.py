"""`--format saedashboard`: the features of the browser as SAEDashboard writes them, for Neuronpedia.

A hookpoint has a folder with `batch-0.json`, which SAEDashboard's `NeuronpediaDashboardBatch` holds and Neuronpedia's
converter reads. What the browser does not measure stays empty: neurons, correlated features, the histogram of logits.
"""

from pathlib import Path
from typing import Any

import polars as pl

from babelscope import config
from babelscope.browse.firings import BANDS
from babelscope.config import Config
from babelscope.config.values import local_name
from babelscope.core import stage
from babelscope.core.errors import UserError, nearest
from babelscope.core.files import read_table, write_json
from babelscope.core.paths import Paths
from babelscope.models.names import layer_of

# The bin of the most active texts.
_TOP = {"bin_min": -1.0, "bin_max": 99.0, "bin_contains": -1.0}
_TABLES = ("features", "probabilities", "histograms", "texts", "examples", "tokens")
Tables = dict[str, pl.DataFrame]


def batch(hookpoint: str, tables: Tables, tokens: int, params: Config) -> dict[str, Any]:
    """The content of `batch-0.json`: all features of a hookpoint.

    Parameters
    ----------
    tables: those of stage `browse` by name.
    tokens: tokens of the train split, from which the firing rates are.
    """
    here = {name: rows.filter(hookpoint=hookpoint) for name, rows in tables.items() if name != "texts"}
    parts = {name: rows.partition_by("unit", as_dict=True, maintain_order=True) for name, rows in here.items()}
    pieces = dict(tables["texts"].select("text_id", "pieces").iter_rows())
    about = {
        "n_prompts_total": len(pieces), "n_tokens_in_prompt": params.corpus.max_tokens,
        "dataset": "data/corpus/texts.parquet",
    }  # fmt: skip
    features = []
    for unit, largest in here["features"].select("unit", "largest").iter_rows():
        one = {name: rows.get((unit,), here[name].clear()) for name, rows in parts.items()}
        histogram = one["histograms"].select("low", "high", count=pl.col("own") + pl.col("other"))
        features.append({
            "feature_index": unit, **_promoted(one["tokens"]), **about,
            "frac_nonzero": int(one["probabilities"]["tokens"].sum()) / tokens,
            "freq_hist_data_bar_values": ((histogram["low"] + histogram["high"]) / 2).round(3).to_list(),
            "freq_hist_data_bar_heights": [float(count) for count in histogram["count"]],
            "activations": [
                {**(_interval(max(values), largest, histogram) if side == "sample" else _TOP), "tokens": pieces[text],
                 "values": values, "qualifying_token_index": values.index(max(values))}
                for side, text, values in one["examples"].select("side", "text_id", "activations").iter_rows()
            ],
        })  # fmt: skip
    return {
        "model_id": local_name(params.model.name), "layer": layer_of(hookpoint), "sae_set": hookpoint,
        "sae_id_suffix": None, "features": features,
    }  # fmt: skip


def _promoted(tokens: pl.DataFrame) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for name, side in (("pos", "promoted"), ("neg", "suppressed")):
        rows = tokens.filter(side=side).sort("place")
        found |= {f"{name}_str": rows["token"].to_list(), f"{name}_values": rows["logit"].to_list()}
    return found


def _interval(peak: float, largest: float, histogram: pl.DataFrame) -> dict[str, float]:
    """The band of activations that a sampled text's largest one is in, and the share of the feature's firings in it."""
    low, high = next((low, high) for low, high in BANDS if peak >= low * largest)
    middle = (pl.col("low") + pl.col("high")) / 2
    inside = int(histogram.filter(middle.is_between(low * largest, high * largest))["count"].sum())
    share = inside / int(histogram["count"].sum())
    return {"bin_min": low * largest, "bin_max": high * largest, "bin_contains": share}


def main(target: Path, hookpoints: list[str]) -> None:
    """Write `<target>/<hookpoint>/batch-0.json` for `hookpoints`, or for all whose features the browser shows.

    Raises
    ------
    UserError: `browse` has not run, or the browser has no features of one of `hookpoints`.
    """
    params, paths = config.load(), Paths()
    tables = {name: read_table(paths.browse / f"{name}.parquet") for name in _TABLES}
    have = tables["features"]["hookpoint"].unique(maintain_order=True).to_list()
    for name in hookpoints:
        if name not in have:
            raise UserError(f"{name}: the feature browser has no features of it; {nearest(name, have)}")
    written = []
    for name in hookpoints or have:
        content = batch(name, tables, int(read_table(paths.totals(name))["tokens"].sum()), params)
        write_json(target / name / "batch-0.json", content)
        written.append((name, len(content["features"])))
    stage.table(["hookpoint", "features"], written)
