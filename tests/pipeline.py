"""The whole pipeline in this process, one stage after the other as dvc.yaml has them, in a clone of the working tree.

`dvc repro` starts a process for each of its stages: some ten seconds for each, of which most goes to imports.
"""

import json
import math
import runpy
import shutil
import socket
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing
from itertools import product
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from clone import clone, dvc
from closure import ROOT

from babelscope import config, sae
from babelscope.models.hookpoints import layer_of

RESULTS = ("data", "metrics", "reports", ".scratch", "dvc.lock")
# docs/contracts.md
COUNTS = ["layer", "unit", "language", "tokens", "texts", "sum", "max", "min_positive"]
NLL = ["method", "kind", "ablated", "control", "evaluated", "nll", "tokens", "delta", "low", "high"]
PREDICTIONS = ["text_id", "language", "method", "normalize", "predicted", "score"]
CONTROL = ["method", "language", "own", "control", "control_high", "others", "control_others", "excess", "excess_low",
           "excess_high", "contrast", "contrast_low", "contrast_high", "above", "selective", "decided", "draws", "p",
           "p_holm", "contrast_p", "contrast_p_holm", "detectable"]  # fmt: skip
RANKED = ("ablation/ranking", "ablation/curve")
COLUMNS = {
    "corpus/texts": ["text_id", "language", "split", "group", "source", "text"],
    "activations/tokens": ["row", "text_id", "language", "split", "position", "token_id"],
    "neurons/totals": ["language", "tokens", "texts"],
    "scores/features": ["kind", "hookpoint", "layer", "unit", "language", "probability", "entropy", "members",
                        "monolinguality", "rank"],
    "scores/similarity": ["language", "other", "units", "jaccard"],
    "ablation/nll": NLL,
    "ablation/by_layer": ["hookpoint", "layer", *NLL],
    "ablation/control": CONTROL,
    "ablation/control_script": CONTROL,
    "ablation/ranking": ["hookpoint", "layer", "unit", "language", "entropy", "rank", "own", "others", "effect",
                         "causal_rank"],
    "ablation/curve": ["method", "language", "top", "features", "tokens", "own", "low", "high", "others", "control"],
    "quality/loss_recovered": ["hookpoint", "layer", "language", "tokens", "nll_clean", "nll_sae", "nll_zero",
                               "loss_recovered", "low", "high"],
    "stability/features": ["hookpoint", "unit", "language", "partner", "cosine", "overlap", "others", "others_share",
                           "others_cosine", "others_overlap", "matched", "encoder_cosine"],
    "stability/again": ["hookpoint", "seed", "language", "unit", "probability", "entropy", "rank"],
    "sharing/pairs": ["hookpoint", "layer", "language", "other", "groups", "translations", "random", "typology"],
    "switching/pairs": ["language", "other", "groups", "cost", "switched", "stayed", "effect", "host", "alone",
                        "effect_low", "effect_high"],
    "switching/positions": ["hookpoint", "layer", "language", "other", "position", "host", "intruder"],
    "identify/predictions": PREDICTIONS,
    "identify/confusion": ["method", "normalize", "language", "predicted", "texts"],
    "browse/features": ["hookpoint", "layer", "unit", "kind", "languages", "members", "entropy", "largest",
                        "delta", "delta_low", "delta_high", "delta_tokens", "delta_texts"],
    "browse/probabilities": ["hookpoint", "layer", "unit", "language", "tokens", "probability"],
    "browse/histograms": ["hookpoint", "layer", "unit", "bin", "low", "high", "own", "other"],
    "browse/texts": ["text_id", "language", "split", "pieces"],
    "browse/examples": ["hookpoint", "layer", "unit", "side", "place", "text_id", "activations"],
    "browse/neighbours": ["hookpoint", "layer", "unit", "place", "neighbour", "cosine"],
    "browse/tokens": ["hookpoint", "layer", "unit", "side", "place", "token_id", "token", "logit"],
    "explain/explanations": ["hookpoint", "layer", "unit", "language", "explanation", "detection", "fuzzing", "texts"],
}  # fmt: skip


def value(content: Any, dotted: str) -> Any:
    for key in dotted.split("."):
        content = content[key]
    return content


def changed(content: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the content of params.yaml with other values under dotted keys."""
    result: dict[str, Any] = json.loads(json.dumps(content))
    for dotted, new in changes.items():
        *path, last = dotted.split(".")
        section = value(result, ".".join(path)) if path else result
        assert last in section, dotted
        section[last] = new
    return result


def commands(params: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """The script of every stage, with its hookpoint or name if it has one, in dvc.yaml's order."""
    for name, stage in config.read_yaml(ROOT / "dvc.yaml")["stages"].items():
        if "matrix" in stage:
            lists = [value(params, values.strip("${}")) for values in stage["matrix"].values()]
            yield from ((name, *map(str, items)) for items in product(*lists))
        else:
            yield (name,)


def offline(patch: pytest.MonkeyPatch, cache: Path) -> list[str]:
    """Let no host but this one be found; returns the names that are looked for from now on."""
    import datasets
    import huggingface_hub.constants

    asked: list[str] = []
    find = socket.getaddrinfo

    def getaddrinfo(host: Any, *arguments: Any, **options: Any) -> Any:
        if host in ("127.0.0.1", "localhost"):
            return find(host, *arguments, **options)
        asked.append(str(host))
        raise OSError(f"{host}: no network in tests")

    patch.setattr(socket, "getaddrinfo", getaddrinfo)
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))
    for constants in (datasets.config, huggingface_hub.constants):
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
    return asked


class Pipeline:
    """A clone in which pipelines with different params run one after the other; MLflow's database stays."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        clone(folder)

    def run(self, params: dict[str, Any]) -> dict[str, float]:
        """Run every stage with these params, and check what must hold of any; returns the numbers of metrics/."""
        for name in RESULTS:
            path = self.folder / name
            if path.is_dir():
                shutil.rmtree(path)
            path.unlink(missing_ok=True)
        (self.folder / "params.yaml").write_text(json.dumps(params, ensure_ascii=False))  # which is YAML, too
        before = set(self.summaries())
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.folder)
            patch.delenv("DVC_ROOT", raising=False)
            asked = offline(patch, self.folder / ".cache")
            for name, *arguments in commands(params):
                if name == "track":  # it asks dvc.lock for the state: this writes it without running anything
                    dvc(self.folder, "commit", "--force", "--quiet")
                patch.setattr("sys.argv", [f"stages/{name}.py", *arguments])
                runpy.run_path(str(ROOT / f"stages/{name}.py"), run_name=f"stages.{name}")["main"]()
        assert not asked
        self.check_outputs(params)
        numbers = self.metrics()
        self.check_numbers(params, numbers)
        [new] = set(self.summaries()) - before
        check_summary(self.logged(new), numbers, [*params["hookpoints"], *params["neurons"]["hookpoints"]])
        return {f"{name}/{key}": number for (name, key), number in numbers.items()}

    def table(self, name: str) -> pl.DataFrame:
        return pl.read_parquet(self.folder / f"data/{name}.parquet")

    def check_outputs(self, params: dict[str, Any]) -> None:
        """What docs/contracts.md says of every output."""
        section = params["ablate"]
        absent = set() if section["rank_tokens"] else set(RANKED)
        absent |= set() if section["script_draws"] else {"ablation/control_script"}
        assert not any((self.folder / f"data/{name}.parquet").exists() for name in absent)
        for name, columns in COLUMNS.items():
            assert name in absent or self.table(name).columns == columns, name
        texts, languages = self.table("corpus/texts"), params["languages"]
        assert set(texts.select("language", "split").unique().rows()) == {
            (language, split) for language in languages for split in ("train", "eval")
        }
        assert texts.group_by("group").agg(pl.col("split").n_unique())["split"].max() == 1
        train = texts.filter(split="train").group_by("language").len()
        for hookpoint in params["hookpoints"]:
            dictionary, totals = sae.load(self.folder / "data/sae", hookpoint), self.table(f"counts/{hookpoint}.totals")
            counts = self.table(f"counts/{hookpoint}")
            assert counts.columns == COUNTS and counts["tokens"].min() > 0 and counts["unit"].max() < dictionary.latents
            assert dict(totals.select("language", "texts").iter_rows()) == dict(train.iter_rows())
            assert (self.folder / f"data/sae/{hookpoint}/history.csv").exists() == (
                params["train"]["source"] != "pretrained"
            )
        for hookpoint in params["neurons"]["hookpoints"]:
            assert self.table(f"neurons/{hookpoint}").columns == COUNTS
        for hookpoint, seed in product(params["stability"]["hookpoints"], params["stability"]["seeds"]):
            assert sae.load(self.folder / f"data/sae_again/{seed}", hookpoint).latents == params["train"]["latents"]
        nll, methods = self.table("ablation/nll"), params["ablate"]["methods"]
        assert nll["method"].unique(maintain_order=True).to_list() == methods
        matrix = nll.filter(pl.col("control").is_null())
        rows = len(languages) * (len(languages) + 1)  # of each method: every language ablated, and none
        assert matrix.group_by("method").len().sort("method").rows() == [(name, rows) for name in sorted(methods)]
        assert nll["nll"].is_finite().all()
        assert (self.folder / "data/identify/also.parquet").exists() == (params["identify"]["also"] is not None)
        if params["identify"]["also"] is not None:
            there, held_out = (set(self.table(f"identify/{name}")["language"]) for name in ("also", "predictions"))
            assert there == held_out <= set(languages)  # one that fastText does not know may be left out of both
        steered = self.table("steer/generations").filter(decoding="greedy").group_by("language", "method").len()
        assert set(steered["len"]) == {params["steer"]["prompts"]}
        pages = {path.name for path in (self.folder / "reports").iterdir()}
        assert pages >= {"report.html", "features.html", "features_by_layer.png", "ablation.png", "plots"}

    def check_numbers(self, params: dict[str, Any], numbers: Mapping[tuple[str, str], float]) -> None:
        """What metrics/ says is what the tables come to."""
        languages, features = params["languages"], self.table("scores/features").filter(kind="sae")
        assert numbers["score", "features"] == features.select("hookpoint", "unit").n_unique()
        for language in languages:
            assert numbers["score", f"features/{language}"] == features.filter(language=language).height
        for hookpoint in params["hookpoints"]:
            counts, totals = self.table(f"encoded/{hookpoint}"), self.table(f"encoded/{hookpoint}.totals")
            assert numbers[f"encode.{hookpoint}", "l0"] == counts["tokens"].sum() / totals["tokens"].sum()
            assert math.isfinite(numbers[f"train.{hookpoint}", "fvu"])
        together = self.table("ablation/nll").filter(pl.col("control").is_null())
        alone = self.table("ablation/by_layer").filter(pl.col("control").is_null())
        unnamed = 0
        for method in params["ablate"]["methods"]:
            prefix = f"{method}/" if ("ablate", f"{method}/own") in numbers else ""
            unnamed += not prefix
            rows = together.filter(method=method)
            clean = dict(rows.filter(pl.col("ablated").is_null()).select("evaluated", "nll").iter_rows())
            rows = rows.filter(pl.col("ablated").is_not_null())
            for ablated, evaluated, nll, delta in rows.select("ablated", "evaluated", "nll", "delta").iter_rows():
                assert nll - clean[evaluated] == pytest.approx(delta, abs=1e-6)
                if ablated == evaluated:
                    assert numbers["ablate", f"{prefix}dnll_own/{ablated}"] == delta
                    assert numbers["ablate", f"{prefix}nll_clean/{ablated}"] == clean[ablated]
            own = rows.filter(pl.col("ablated") == pl.col("evaluated"))
            assert numbers["ablate", f"{prefix}own"] == pytest.approx(own["delta"].mean())
            own = alone.filter(pl.col("method") == method, pl.col("ablated") == pl.col("evaluated"))
            for hookpoint, delta in own.group_by("hookpoint").agg(pl.mean("delta")).iter_rows():
                assert numbers["ablate", f"{prefix}own_alone/{hookpoint}"] == pytest.approx(delta)
        assert unnamed == 1
        for name, prefix in (("predictions", ""), ("also", "also/")):
            if not (self.folder / f"data/identify/{name}.parquet").exists():
                continue
            hits = pl.col("language") == pl.col("predicted")
            table = self.table(f"identify/{name}").group_by("method", "normalize").agg(hits.mean())
            for method, normalize, share in table.iter_rows():
                # Of all texts, also where some are left out of the comparison with fastText.
                keys = [("identify", f"{prefix}{over}accuracy/{method}/{normalize}") for over in ("", "all_languages/")]
                assert share in [pytest.approx(numbers[key]) for key in keys if key in numbers]

    def planted_owners(self, params: dict[str, Any]) -> int:
        """How many of the latents that `stand_ins.planted` made for a language are selected: for that one only."""
        features = self.table("scores/features").filter(pl.col("unit") < len(params["languages"]), kind="sae")
        for unit, language in features.select("unit", "language").iter_rows():
            assert params["languages"][unit] == language
        return len(features)

    def metrics(self) -> dict[tuple[str, str], float]:
        """Every number of metrics/, by file and key."""
        files = sorted((self.folder / "metrics").glob("*.json"))
        content = {path.stem: json.loads(path.read_text()) for path in files}
        return {(name, key): number for name, part in content.items() for key, number in part.items()
                if not isinstance(number, str)}  # fmt: skip

    def summaries(self) -> list[str]:
        """The ids of MLflow's summary runs."""
        if not (self.folder / "mlflow.db").exists():
            return []
        query = (
            "select r.run_uuid from runs r join tags t on t.run_uuid = r.run_uuid where t.key = 'babelscope.kind' "
            "and t.value = 'summary' and r.lifecycle_stage = 'active' and r.status = 'FINISHED'"
        )
        with closing(sqlite3.connect(self.folder / "mlflow.db")) as database:
            return [found for (found,) in database.execute(query)]

    def logged(self, run_id: str) -> dict[tuple[str, int], float]:
        """The metrics of a run by name and step."""
        with closing(sqlite3.connect(self.folder / "mlflow.db")) as database:
            rows = database.execute("select key, step, value from metrics where run_uuid = ?", [run_id])
            return {(key, step): number for key, step, number in rows}


def check_summary(
    logged: Mapping[tuple[str, int], float], numbers: Mapping[tuple[str, str], float], hookpoints: list[str]
) -> None:
    """Every number of metrics/ is in MLflow: under its key, or as a point over the layers (`fvu_by_layer/en`).

    The name ends in the stage where several stages have the key, and says what of a layer it is of where two
    hookpoints are of one (`fvu_by_layer/mlp/en`).
    """
    missing = []
    for (file, key), number in numbers.items():
        stage, _, hookpoint = file.partition(".")
        parts, step = key.split("/"), 0
        names = {key}
        at = next((i for i, part in enumerate(parts) if part in hookpoints), None)
        if hookpoint or at is not None:
            hookpoint = hookpoint or parts[at or 0]
            step, place = layer_of(hookpoint), hookpoint.partition(".")[2].partition(".")[2] or "residual"
            head, tail = "/".join(parts[: at or 1]) + "_by_layer", parts[at + 1 if at else 1 :]
            names = {"/".join([head, *tail]), "/".join([head, place, *tail])}
        found = {logged.get((end, step)) for name in names for end in (name, f"{name}/{stage}")}
        if key != "layer" and math.isfinite(number) and number not in found:
            missing.append((file, key, number))
    assert not missing, missing[:10]
