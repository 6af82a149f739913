"""`babelscope features LANGUAGE`: a language's first features, with what they fire on, promote and do."""

import math
import sys
from collections.abc import Sequence
from pathlib import Path

import polars as pl

from babelscope import config
from babelscope.config import Config
from babelscope.core.errors import UserError, nearest
from babelscope.core.files import read_table
from babelscope.core.paths import Paths
from babelscope.core.terminal import aligned
from babelscope.report.numbers import plain
from babelscope.report.parts import layer_labels

_KEY = ["hookpoint", "unit"]
# Tokens in a cell.
_TOKENS = 4


def main(language: str, number: int) -> None:
    """Print the first `number` features of a language to the standard output."""
    sys.stdout.write(table(language, number, config.load(), Paths(Path())) + "\n")


def table(language: str, number: int, params: Config, paths: Paths) -> str:
    """The features as lines of text.

    Raises
    ------
    UserError: params.yaml does not list the language, it has no features, or an earlier stage has not run.
    """
    if language not in params.languages:
        raise UserError(f"{language}: not a language of params.yaml; {nearest(language, params.languages)}")
    selected = read_table(paths.features).filter(kind="sae", language=language).sort("rank")
    if selected.is_empty():
        raise UserError(f"{paths.features}: {language} has no features (docs/troubleshooting.md says what to change)")
    chosen = selected.head(number)
    frames = {
        name: read_table(paths.browse / f"{name}.parquet") for name in ("features", "examples", "tokens", "texts")
    }
    shown = chosen.join(
        frames["features"].select(*_KEY, "delta", "delta_texts"), on=_KEY, how="left", maintain_order="left"
    )
    labels, rows = layer_labels(params.hookpoints), []
    for row in shown.iter_rows(named=True):
        key = {name: row[name] for name in _KEY}
        effect = f"{plain(row['delta'], 3, sign=True)} ({row['delta_texts']})" if row["delta"] is not None else "–"
        rows.append([
            str(row["rank"]), f"{labels[row['hookpoint']]}/{row['unit']}", plain(math.exp(row["entropy"]), 2),
            f"{100 * row['probability']:.1f} %", effect,
            _words(fires_on(frames["examples"].filter(**key, side="own"), frames["texts"])),
            _words(frames["tokens"].filter(**key, side="promoted").sort("place")["token"].to_list()),
        ])  # fmt: skip
    head = ["rank", "feature", "languages", "fires", "ΔNLL (texts)", "fires on", "promotes"]
    order = "most specific" if params.score.order == "entropy" else "most active"
    notes = [
        "languages: effective number of languages on which it fires. fires: share of the language's tokens.",
        "ΔNLL: change of the loss if it is removed, on a few held-out texts of its language (nats/token).",
        f"{paths.reports / 'features.html'} shows each of them.",
    ]
    first = f"{language}: {len(chosen)} of {len(selected)} features, the {order} first"
    return "\n".join([first, "", *aligned([head, *rows], right=(2, 3, 4)), "", *notes])


def fires_on(examples: pl.DataFrame, texts: pl.DataFrame) -> list[str]:
    """The pieces of the texts of `examples` with the largest activations, each once, the largest first."""
    pairs = examples.join(texts.select("text_id", "pieces"), on="text_id").select("pieces", "activations")
    found = pairs.explode("pieces", "activations").filter(pl.col("activations") > 0)
    return (
        found.sort("activations", descending=True, maintain_order=True)["pieces"].unique(maintain_order=True).to_list()
    )


def _words(words: Sequence[str]) -> str:
    return " ".join(word.strip() or repr(word) for word in words[:_TOKENS]) or "–"
