"""Stage `report`: all results as one self-contained HTML page, the features as another, pictures, and DVC's plots."""

import importlib.metadata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import polars as pl

from babelscope.activations.rows import read_rows
from babelscope.config import Config
from babelscope.config.values import local_name, model_title
from babelscope.core import stage
from babelscope.core.errors import UserError
from babelscope.core.files import read_json, read_table, write_atomically, write_json
from babelscope.core.fingerprint import content_md5
from babelscope.core.paths import Paths
from babelscope.report import about, browser, charts, page, summary
from babelscope.report.parts import ReportInputs
from babelscope.report.sections import ablation, features
from babelscope.report.sections.features import found

PACKAGES = (
    "babelscope", "torch", "transformers", "lightning", "polars", "mlflow", "dvc", "altair", "vl-convert-python",
)  # fmt: skip


def run(params: Config, paths: Paths) -> None:
    """Write the report, the feature browser, the two pictures and the plots below `paths.reports`, and the summary."""
    inputs = read(params, paths)
    write_json(paths.summary, summary.headline(inputs))
    matrix, counts = ablation.matrix(inputs), features.counts(inputs)
    plots = {
        "training": training_curves(params, paths),
        "features_by_layer": counts.rename({"value": "features"}).drop("href"),
        "ablation": matrix.rename({"value": "delta"}).drop("own", "largest", "href"),
    }
    files = {
        "report.html": page.build(inputs).encode(),
        "features.html": browser.build(read_features(params, paths, inputs)).encode(),
        "features_by_layer.png": charts.png(features.chart(counts)),
        "ablation.png": charts.png(ablation.chart(matrix, inputs.languages)),
        **{f"plots/{name}.csv": frame.write_csv().encode() for name, frame in plots.items()},
    }
    for name, content in files.items():
        write_atomically(paths.reports / name, lambda path, content=content: path.write_bytes(content))  # type: ignore[misc]
    sizes = [[paths.reports / name, f"{len(content) / 1e6:.2f}"] for name, content in files.items() if "/" not in name]
    stage.table(["page or picture", "MB"], sizes)


def read(params: Config, paths: Paths) -> ReportInputs:
    """What the page shows.

    Raises
    ------
    UserError: a file is missing that the page cannot do without, or one is damaged.
    """
    alone = ("sample", "extract", "extend", "quality", "score", "stability", "sharing", "identify", "ablate",
             "baselines", "script", "steer", "switching")  # fmt: skip
    metrics = {name: paths.metrics(name) for name in alone}
    metrics |= {f"{name}.{at}": paths.metrics(name, at) for name in ("train", "encode") for at in params.hookpoints}
    needed = {"features": paths.features, "nll": paths.ablation / "nll.parquet"}
    optional = {
        "by_layer": paths.ablation / "by_layer.parquet", "control": paths.ablation / "control.parquet",
        "curve": paths.ablation / "curve.parquet",
        "confusion": paths.identification / "confusion.parquet", "similarity": paths.similarity,
        "generations": paths.generations, "baselines": paths.baselines / "identification.parquet",
        "sharing": paths.sharing, "script": paths.script / "features.parquet",
        "switching": paths.switching / "pairs.parquet", "switch_positions": paths.switching / "positions.parquet",
    }  # fmt: skip
    _check([*needed.values(), *metrics.values()], "the stages before `report` write it")
    frames = needed | {name: path for name, path in optional.items() if path.is_file()}
    tables = {"by_layer": None} | {name: read_table(path) for name, path in frames.items()}
    files = (*metrics.values(), *frames.values())
    return ReportInputs(
        # Neither the hardware nor the tracking changes a result, so neither changes the page.
        params=portable(params.model_dump(exclude={"hardware", "track"}, exclude_unset=True)),
        metrics={name: read_json(path) for name, path in metrics.items()},
        files={path.relative_to(paths.root).as_posix(): content_md5(path) for path in files},
        versions={package: version(package) for package in PACKAGES},
        bytes_per_token=bytes_per_token(paths, params.corpus.max_tokens),
        **tables,  # type: ignore[arg-type]
    )


def bytes_per_token(paths: Paths, max_tokens: int) -> dict[str, float]:
    """UTF-8 bytes per token of each language's held-out texts; without those that `max_tokens` cut."""
    sizes = read_rows(paths, columns=["text_id"]).group_by("text_id").len("tokens")
    texts = read_table(paths.texts).filter(split="eval").join(sizes, on="text_id").filter(pl.col("tokens") < max_tokens)
    size = pl.col("text").str.len_bytes().sum() / pl.col("tokens").sum()
    return dict(texts.group_by("language").agg(size).sort("language").iter_rows())


def read_features(params: Config, paths: Paths, inputs: ReportInputs | None = None) -> browser.BrowserInputs:
    """What the feature browser shows; `inputs`: of the report, for the facts about languages and layers."""
    files = {name: paths.browse / f"{name}.parquet" for name in browser.COLUMNS}
    _check(files.values(), "stage `browse` writes it")
    ranking, script = paths.ablation / "ranking.parquet", paths.script / "features.parquet"
    optional = {
        "explanations": paths.explanations, "stability": paths.stability, "ranking": ranking, "script": script,
    }  # fmt: skip
    files |= {name: path for name, path in optional.items() if path.is_file()}
    frames = {name: read_table(path) for name, path in files.items()}
    facts, cells = ({}, {}) if inputs is None else (about.about(inputs), about.cells(inputs))
    selected = 0 if inputs is None or inputs.members > 1 else found(inputs)
    model = model_title(params.model.model_dump())
    return browser.BrowserInputs(params.languages, params.hookpoints, model, frames, selected, facts, cells)


def training_curves(params: Config, paths: Paths) -> pl.DataFrame:
    """The history of every SAE; without a row if the SAEs were trained elsewhere."""
    if params.train.source == "pretrained":
        return pl.DataFrame(schema={"step": pl.Int64, "tokens": pl.Int64, "fvu": pl.Float64, "hookpoint": pl.String})
    files = {name: paths.saes / name / "history.csv" for name in params.hookpoints}
    _check(files.values(), "stage `train` writes it")
    return pl.concat([pl.read_csv(path).with_columns(hookpoint=pl.lit(name)) for name, path in files.items()])


def _check(files: Iterable[Path], origin: str) -> None:
    missing = [str(path) for path in files if not path.is_file()]
    if missing:
        raise UserError(f"{', '.join(missing)}: no such file; {origin}: dvc repro report")


def portable(content: Any) -> Any:
    """`content` with the last part of every absolute path, because the rest differs between machines."""
    if isinstance(content, dict):
        return {key: portable(value) for key, value in content.items()}
    if isinstance(content, list):
        return [portable(value) for value in content]
    return local_name(content) if isinstance(content, str) and content.startswith(("/", "~")) else content


def version(package: str) -> str:
    """The installed version of a package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
