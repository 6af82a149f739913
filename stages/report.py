"""Stage `report`: all results as one self-contained HTML page, the features as another, pictures, and DVC's plots."""

import hashlib
import importlib.metadata
from pathlib import Path
from typing import Any

import polars as pl

from babelscope import config
from babelscope.config.values import local_name
from babelscope.core import stage
from babelscope.core.errors import UserError
from babelscope.core.files import read_json, read_table, write_atomically
from babelscope.report import browser, charts, data, page

FEATURES = Path("data/scores/features.parquet")
NLL = Path("data/ablation/nll.parquet")
OPTIONAL = {
    "by_layer": Path("data/ablation/by_layer.parquet"),
    "control": Path("data/ablation/control.parquet"),
    "confusion": Path("data/identify/confusion.parquet"),
    "similarity": Path("data/scores/similarity.parquet"),
    "generations": Path("data/steer/generations.parquet"),
}
BROWSE, SAES, OUT = Path("data/browse"), Path("data/sae"), Path("reports")
EXPLANATIONS = Path("data/explain/explanations.parquet")
PACKAGES = (
    "babelscope",
    "torch",
    "transformers",
    "lightning",
    "polars",
    "mlflow",
    "dvc",
    "altair",
    "vl-convert-python",
)


def metric_files(hookpoints: list[str]) -> dict[str, Path]:
    """The metrics that the page shows, by name."""
    names = ["sample", "extract", *(f"{s}.{h}" for s in ("train", "encode") for h in hookpoints)]
    names += ["quality", "score", "stability", "identify", "ablate", "steer"]
    return {name: Path(f"metrics/{name}.json") for name in names}


def portable(content: Any) -> Any:
    """`content` with the last part of every absolute path, whose rest differs between machines."""
    match content:
        case dict():
            return {key: portable(value) for key, value in content.items()}
        case list():
            return [portable(value) for value in content]
        case str() if content.startswith(("/", "~")):
            return local_name(content)
    return content


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def read(params: config.Config) -> data.ReportInputs:
    metrics = metric_files(params.hookpoints)
    files = [FEATURES, NLL, *metrics.values()]
    missing = [str(path) for path in files if not path.is_file()]
    if missing:
        raise UserError(f"{', '.join(missing)}: no such file; the stages before `report` write it: dvc repro report")
    there = {name: path for name, path in OPTIONAL.items() if path.is_file()}
    files += there.values()
    frames = {name: read_table(path) for name, path in there.items()}
    return data.ReportInputs(
        # Neither the hardware nor the tracking changes a result, so neither changes the page.
        params=portable(params.model_dump(exclude={"hardware", "track"}, exclude_unset=True)),
        features=read_table(FEATURES),
        nll=read_table(NLL),
        by_layer=frames.pop("by_layer", None),
        metrics={name: read_json(path) for name, path in metrics.items()},
        files={path.as_posix(): hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest() for path in files},
        versions={package: version(package) for package in PACKAGES},
        **frames,
    )


def read_features(params: config.Config) -> browser.BrowserInputs:
    files = {name: BROWSE / f"{name}.parquet" for name in browser.COLUMNS}
    missing = [str(path) for path in files.values() if not path.is_file()]
    if missing:
        raise UserError(f"{', '.join(missing)}: no such file; stage `browse` writes it: dvc repro report")
    frames = {name: read_table(path) for name, path in files.items()}
    if EXPLANATIONS.is_file():
        frames["explanations"] = read_table(EXPLANATIONS)
    return browser.BrowserInputs(params.languages, params.hookpoints, local_name(params.model.name), frames)


def training_curves(hookpoints: list[str], pretrained: bool) -> pl.DataFrame:
    if pretrained:
        return pl.DataFrame(schema={"step": pl.Int64, "tokens": pl.Int64, "fvu": pl.Float64, "hookpoint": pl.String})
    paths = {name: SAES / name / "history.csv" for name in hookpoints}
    missing = [str(path) for path in paths.values() if not path.is_file()]
    if missing:
        raise UserError(f"{', '.join(missing)}: no such file; stage `train` writes it: dvc repro report")
    return pl.concat([pl.read_csv(path).with_columns(hookpoint=pl.lit(name)) for name, path in paths.items()])


def main() -> None:
    params = config.load()
    inputs, features = read(params), read_features(params)
    texts = {"report.html": page.build(inputs), "features.html": browser.build(features)}
    for file, text in texts.items():
        write_atomically(OUT / file, lambda path, text=text: path.write_text(text, encoding="utf-8"))  # type: ignore[misc]
    plots = {
        "training": training_curves(params.hookpoints, params.train.source == "pretrained"),
        "features_by_layer": data.counts(inputs).rename({"value": "features"}),
        "ablation": data.matrix(inputs).rename({"value": "delta"}).drop("own", "largest"),
    }
    for name, frame in plots.items():
        write_atomically(OUT / f"plots/{name}.csv", frame.write_csv)
    write_atomically(OUT / "plots/page.html", lambda path: path.write_text(page.for_dvc(), encoding="utf-8"))
    pictures = page.pictures(inputs)
    for file, name in (("features_by_layer.png", "features"), ("ablation.png", "ablation")):
        image = charts.png(pictures[name])
        write_atomically(OUT / file, lambda path, image=image: path.write_bytes(image))  # type: ignore[misc]
    written = [OUT / file for file in (*texts, "features_by_layer.png", "ablation.png")]
    stage.table(["page or picture", "MB"], [[path, f"{path.stat().st_size / 1e6:.2f}"] for path in written])


if __name__ == "__main__":
    stage.run(main)
