"""Stages of a toy pipeline with the real one's files, for test_tracking.py: `toy_pipeline.py <stage> [hookpoint]`."""

import math
import os
import signal
import sys
import time
from pathlib import Path

import polars as pl

from babelscope import config
from babelscope.core import stage
from babelscope.core.files import write_json
from babelscope.core.fingerprint import dvc_md5, fingerprint
from babelscope.tracking.training import TrainingRun

STEPS = range(0, 100, 10)
TEXTS = Path("data/corpus/texts.parquet")

DVC_YAML = """\
stages:
  sample:
    cmd: exec python {toy} sample
    params:
    - languages
    outs:
    - data/corpus/texts.parquet
    metrics:
    - metrics/sample.json:
        cache: false
  train:
    matrix:
      hookpoint: ${{hookpoints}}
    cmd: exec python {toy} train ${{item.hookpoint}}
    deps:
    - data/corpus/texts.parquet
    params:
    - train
    - seed
    outs:
    - data/sae/${{item.hookpoint}}
    metrics:
    - metrics/train.${{item.hookpoint}}.json:
        cache: false
  score:
    cmd: exec python {toy} score
    deps:
    - data/sae
    params:
    - hookpoints
    - languages
    - train.k
    - score.ratio
    outs:
    - data/scores/features.parquet
    - data/ablation
    metrics:
    - metrics/score.json:
        cache: false
  report:
    cmd: exec python {toy} report
    deps:
    - data/scores/features.parquet
    outs:
    - reports
  track:
    cmd: exec python {track}
    always_changed: true
    deps:
    - reports
    - metrics
"""


def loss(k: int, step: int) -> float:
    """The curve of a toy training, exact in every file that it goes through."""
    return round(math.exp(-step / 50) + 1 / k, 4)


def sample(params: config.Config) -> None:
    TEXTS.parent.mkdir(parents=True, exist_ok=True)
    pl.DataFrame({"language": params.languages, "text": ["hello"] * len(params.languages)}).write_parquet(TEXTS)
    write_json(Path("metrics/sample.json"), {"tokens": 7, "texts": len(params.languages)})


def train(params: config.Config, hookpoint: str) -> None:
    name, knobs = f"train@{hookpoint}", {"train": params.train.model_dump(), "seed": params.seed}
    key = fingerprint(name, knobs, {str(TEXTS): dvc_md5(TEXTS)})
    die = os.environ.get("TOY_DIE", "") == hookpoint
    rows = []
    with TrainingRun(params, stage=name, fingerprint=key, used=knobs) as run:
        for step in STEPS:
            time.sleep(float(os.environ.get("TOY_SECONDS", "0")) / len(STEPS))
            if die and step == 50:
                while len(run._known) < 8:  # until what was logged is written
                    time.sleep(0.1)
                os.kill(os.getpid(), signal.SIGKILL)
            metrics = {"loss": loss(params.train.k, step)} | (
                {"fvu": loss(params.train.k, step) / 2} if step % 20 == 0 else {}
            )
            run.log(step, metrics)
            rows.append({"step": step, "loss": metrics["loss"], "fvu": metrics.get("fvu")})
        folder = Path("data/sae") / hookpoint
        folder.mkdir(parents=True, exist_ok=True)
        pl.DataFrame(rows, schema={"step": pl.Int64, "loss": pl.Float64, "fvu": pl.Float64}).write_csv(
            folder / "history.csv"
        )
        fvu = loss(params.train.k, 100)
        write_json(Path(f"metrics/train.{hookpoint}.json"), {"fvu": fvu, "fvu/en": fvu + 0.01, "tokens": 5})
        run.finish(dvc_md5(folder), [{key: value for key, value in row.items() if value is not None} for row in rows])


def score(params: config.Config) -> None:
    rows, ablated = [], []
    for place, hookpoint in enumerate(params.hookpoints):
        layer = int(hookpoint.split(".")[1])
        for index, language in enumerate(params.languages[:-1]):  # the last language has none
            count = round((index + 2) * (1 + place) * 10 / math.sqrt(params.train.k))
            rows += [("sae", hookpoint, layer, 100 * index + unit, language, unit) for unit in range(count)]
            cell = ("feature", "sae", hookpoint, layer, language, None, language, 0.01 * count)
            ablated += [cell, (*cell[:6], "en" if language != "en" else "fi", 0.0)]
    columns = ["kind", "hookpoint", "layer", "unit", "language", "rank"]
    features = pl.DataFrame(rows, schema=columns, orient="row")
    names = ["method", "kind", "hookpoint", "layer", "ablated", "control", "evaluated", "delta"]
    by_layer = pl.DataFrame(ablated, schema=names, orient="row", infer_schema_length=None)
    Path("data/scores").mkdir(parents=True, exist_ok=True)
    Path("data/ablation").mkdir(parents=True, exist_ok=True)
    features.write_parquet("data/scores/features.parquet")
    by_layer.with_columns(pl.col("control").cast(pl.Int32)).write_parquet("data/ablation/by_layer.parquet")
    numbers = {f"dnll_own/{name}": 0.1 * i for i, name in enumerate(params.languages)}
    write_json(Path("metrics/score.json"), numbers | {"own": 0.2, "tokens": 3, "features": features.height})


def report() -> None:
    Path("reports").mkdir(exist_ok=True)
    Path("reports/report.html").write_text(
        f"<h1>{pl.read_parquet('data/scores/features.parquet').height} features</h1>"
    )


def main() -> None:
    params = config.load()
    match sys.argv[1:]:
        case ["sample"]:
            sample(params)
        case ["train", hookpoint]:
            train(params, hookpoint)
        case ["score"]:
            score(params)
        case ["report"]:
            report()


if __name__ == "__main__":
    stage.run(main)
