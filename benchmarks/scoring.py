"""`python benchmarks/scoring.py`: the scores on 16 layers x 131,072 units x 45 languages, time and peak memory.

Made-up counts (a Poisson number of tokens for every pair of unit and language, of which some never fire), one parquet
file per layer as `encode` writes them, scanned lazily as `score` does. Each score runs in a process of its own; the
peak is the kernel's (VmHWM), without that of the imports. The bounds are seconds and 2 GiB.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import race

from babelscope.features import lape, monolinguality, sae_lape

LAYERS, UNITS, LANGUAGES, TOKENS, TEXTS = 16, 131_072, 45, 1_000_000, 20_000
PAPER = {"example_rate": 0.98, "token_rate": 0.1, "ratio": 0.5}


def names() -> list[str]:
    return [f"l{number:02}" for number in range(LANGUAGES)]


def make(folder: Path) -> None:
    """Write counts of one layer per file; 1 % of the units fire often enough for the paper's thresholds."""
    for layer in range(LAYERS):
        random = np.random.default_rng(layer)
        mean = np.where(random.random(UNITS) < 0.01, 0.3 * TOKENS, random.lognormal(1.0, 2.0, UNITS))
        tokens = random.poisson(mean[:, None] * random.lognormal(0.0, 1.5, (UNITS, LANGUAGES))).clip(0, TOKENS)
        unit, language = tokens.nonzero()
        fired = tokens[unit, language]
        pl.DataFrame({
            "layer": np.full(len(unit), layer, np.int32),
            "unit": unit.astype(np.int32),
            "language": pl.Series(language).replace_strict(range(LANGUAGES), names(), return_dtype=pl.String),
            "tokens": fired,
            "texts": np.minimum(fired, TEXTS),
            "sum": random.random(len(unit)) * fired,
        }).write_parquet(folder / f"{layer:02}.parquet")  # fmt: skip


def score(name: str, folder: Path) -> pl.DataFrame:
    counts = pl.scan_parquet(sorted(folder.glob("*.parquet")))
    totals = pl.DataFrame({"language": names(), "tokens": [TOKENS] * LANGUAGES, "texts": [TEXTS] * LANGUAGES})
    some = pl.DataFrame({"layer": range(2000), "unit": range(2000)}, schema={"layer": pl.Int32, "unit": pl.Int32})
    some = some.with_columns(pl.col("layer") % LAYERS)
    methods: dict[str, Callable[[], pl.DataFrame]] = {
        "sae_lape": lambda: sae_lape(counts, totals, **PAPER),
        "sae_lape, shared by 2": lambda: sae_lape(counts, totals, **PAPER, members=2),
        "sae_lape, 100 a layer by probability": lambda: sae_lape(
            counts, totals, **PAPER, order="probability", top=100, per_layer=True
        ),
        "lape": lambda: lape(counts, totals, units=LAYERS * UNITS),
        "monolinguality of 2,000 units": lambda: monolinguality(counts, totals, some),
    }
    return methods[name]()


def main() -> None:
    if len(sys.argv) == 3:
        before, start = race.memory("VmRSS"), time.perf_counter()
        rows = len(score(sys.argv[1], Path(sys.argv[2])))
        print(time.perf_counter() - start, race.memory("VmHWM") - before, rows)
        return
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder))
        rows = pl.scan_parquet(f"{folder}/*.parquet").select(pl.len()).collect().item()
        print(f"{LAYERS} layers x {UNITS} units x {LANGUAGES} languages, {rows:,} rows, {race.machine()}")
        records = []
        for name in (
            "sae_lape",
            "sae_lape, shared by 2",
            "sae_lape, 100 a layer by probability",
            "lape",
            "monolinguality of 2,000 units",
        ):
            command = [sys.executable, __file__, name, folder]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            seconds, peak, found = (float(value) for value in done.stdout.split())
            print(f"{name:38}{seconds:8.1f} s{peak / 2**30:8.2f} GiB{found:14,.0f} rows", flush=True)
            records.append(race.record(name, "babelscope", round(seconds, 1), "s"))
            records.append(race.record(name, "peak memory", round(peak / 2**20), "MiB"))
    race.write("scoring", records)


if __name__ == "__main__":
    main()
