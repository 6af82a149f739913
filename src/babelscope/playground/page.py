"""The page of `try --html` and of `serve`: a sentence token by token, as one HTML file that needs nothing else."""

from dataclasses import asdict
from typing import Any

import polars as pl

from babelscope.config.values import model_title
from babelscope.core.files import read_table
from babelscope.core.paths import Paths
from babelscope.playground.reading import STRONGEST, Reader, Reading
from babelscope.report.assets import asset, embedded, rendered, source_hash

# Tokens that a feature promotes, as the page shows them.
_TOKENS = 6


def described(reader: Reader, paths: Paths) -> list[dict[str, Any]]:
    """Every feature as the page shows it; its effect and tokens if stage `browse` has run."""
    features = [asdict(one) | {"delta": None, "promotes": []} for one in reader.features]
    by_id = {one["id"]: one for one in features}
    if (paths.browse / "features.parquet").is_file():
        table = read_table(paths.browse / "features.parquet")
        for hookpoint, unit, delta in table["hookpoint", "unit", "delta"].rows():
            if (one := by_id.get(f"{hookpoint}/{unit}")) is not None:
                one["delta"] = delta
        promoted = read_table(paths.browse / "tokens.parquet").filter(pl.col("place") < _TOKENS, side="promoted")
        for hookpoint, unit, token in promoted.sort("place", maintain_order=True)["hookpoint", "unit", "token"].rows():
            if (one := by_id.get(f"{hookpoint}/{unit}")) is not None:
                one["promotes"].append(token)
    return features


def build(
    reader: Reader,
    paths: Paths,
    *,
    browser: str | None,
    text: str = "",
    reading: Reading | None = None,
    live: bool = False,
) -> str:
    """The page: of one `reading`, or, if it is `live`, one that asks the server for readings and continuations.

    Parameters
    ----------
    browser: address of the feature browser, or None if there is none.

    Nothing but the own server is contacted, and only by a live page: a Content-Security-Policy forbids everything else.
    """
    script, params = asset("playground.js", "playground"), reader.params
    data = {
        "languages": [name for name in params.languages if name in reader.units], "browser": browser, "live": live,
        "text": text, "reading": None if reading is None else as_json(reading), "features": described(reader, paths),
        "tokens": params.steer.new_tokens, "strongest": STRONGEST,
    }  # fmt: skip
    return rendered(
        asset("playground.html.j2", "playground"),
        policy=f"script-src {source_hash(script)}; " + ("connect-src 'self'" if live else "connect-src 'none'"),
        style=asset("page.css") + asset("playground.css", "playground"), script=script, data=embedded(data),
        model=model_title(params.model.model_dump()), live=live, report=browser is not None and live,
    )  # fmt: skip


def as_json(reading: Reading) -> dict[str, Any]:
    """A reading as JSON can hold it."""
    return asdict(reading) | {"fires": [[[number, round(share, 4)] for number, share in one] for one in reading.fires]}
