"""The cells of the notebooks in docs/notebooks/, run in this process on small stand-ins, without Jupyter."""

import ast
import json
from pathlib import Path
from typing import Any

import altair
import playground_example as example
import polars as pl
import pytest
import stand_ins
from closure import ROOT
from test_neurons_stages import stage

NOTEBOOKS = sorted((ROOT / "docs/notebooks").glob("*.ipynb"))


def cells(name: str, kind: str) -> list[str]:
    content = json.loads((ROOT / f"docs/notebooks/{name}.ipynb").read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == kind]


class Notebook:
    """Runs code cells one after the other; `shown` holds the value that Jupyter would show below each."""

    def __init__(self) -> None:
        self.names: dict[str, Any] = {}
        self.shown: list[Any] = []

    def run(self, cell: str) -> None:
        *body, last = ast.parse(cell).body
        if not isinstance(last, ast.Expr):
            exec(compile(ast.Module([*body, last], []), "cell", "exec"), self.names)  # noqa: S102
            return
        exec(compile(ast.Module(body, []), "cell", "exec"), self.names)  # noqa: S102
        value = eval(compile(ast.Expression(last.value), "cell", "eval"), self.names)  # noqa: S307
        if hasattr(value, "to_dict") and not isinstance(value, pl.DataFrame):
            value.to_dict()  # checks the chart against Vega-Lite's schema
        self.shown.append(value)

    def charts(self) -> list[Any]:
        return [value for value in self.shown if isinstance(value, altair.TopLevelMixin)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_holds_no_outputs_and_its_links_lead_somewhere(path: Path) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    assert all(not cell["outputs"] for cell in content["cells"] if cell["cell_type"] == "code")
    assert len({cell["id"] for cell in content["cells"]}) == len(content["cells"])
    linked = [part.partition(")")[0] for text in cells(path.stem, "markdown") for part in text.split("](")[1:]]
    assert linked and all(link.startswith("http") or (path.parent / link).is_file() for link in linked)


def test_the_notebook_of_the_default_runs_on_its_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    example.build(tmp_path)
    stage("neurons")  # none: `ablate` reads that
    stage("ablate")
    (tmp_path / "docs/notebooks").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "docs/notebooks")  # where Jupyter starts
    notebook = Notebook()
    for cell in cells("default", "code"):
        notebook.run(cell)
    names = notebook.names
    assert len(notebook.charts()) == 4
    assert set(names["table"]["unit"]) >= {1} and names["table"]["fires"].null_count() == 0  # 1: planted for tr
    assert names["table"]["promotes"].list.len().to_list() == [4] * len(names["table"])
    assert names["matrix"].height == 9 and set(names["own"]["ablated"]) == set(example.LANGUAGES)
    assert names["reading"].language in example.LANGUAGES and names["fires"]["share"].min() > 0
    assert names["losses"]["change"].is_finite().all() and (names["losses"]["change"] != 0).any()


def test_the_notebook_of_released_saes_runs_on_stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    model = stand_ins.model(tmp_path / "model", "qwen3", 4)
    planted = stand_ins.planted(model, ["layers.2"], ["en", "tr"])
    release = tmp_path / "SAE-Res-W1K-L0_8"
    stand_ins.qwen_scope_release(release, planted, {"layers.2": "layer2.sae.pt"})
    local = {
        "MODEL": str(model), "SAE": str(release), "FOLDER": "layer2.sae.pt", "HOOKPOINT": "layers.2",
        "TEXTS": str(stand_ins.xnli(tmp_path / "xnli", 300)),
    }  # fmt: skip
    install, settings, *others = cells("released", "code")
    assert install.splitlines()[-1].startswith("%pip install ")
    notebook = Notebook()
    notebook.run(settings)
    assert local.keys() < notebook.names.keys()
    notebook.names.update(local)
    for cell in others:
        notebook.run(cell)
    names = notebook.names
    assert len(notebook.charts()) == 1
    owners = {unit: language for unit, language in names["features"].select("unit", "language").iter_rows()}
    assert owners[0] == "en" and owners[1] == "tr"  # those planted
    delta = {(row["ablated"], row["evaluated"]): row["delta"] for row in names["matrix"].to_dicts()}
    assert all(abs(delta[name, name]) > abs(delta[name, other]) for name, other in (("en", "tr"), ("tr", "en")))
