"""What `dvc plots` draws: every file has a template, and with data in it each is a chart that Vega-Lite renders."""

import json
from typing import Any

import pytest
import vl_convert
from closure import ROOT
from ruamel.yaml import YAML

PLOTS = {
    path: settings
    for one in YAML(typ="safe").load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["plots"]
    for path, settings in one.items()
}
ROWS: dict[str, list[dict[str, Any]]] = {
    "training": [{"hookpoint": "layers.6.mlp", "tokens": n, "fvu": 1 / n} for n in (1, 2)],
    "features_by_layer": [{"language": "en", "layer": n, "features": n} for n in (1, 2)],
    "ablation": [{"ablated": "en", "evaluated": name, "delta": 0.1} for name in ("en", "de")],
}


@pytest.mark.parametrize("path", PLOTS)
def test_templates_draw(path: str) -> None:
    settings = PLOTS[path]
    name = settings["template"]
    assert path == f"reports/plots/{name}.csv" and {settings["x"], settings["y"]} <= set(ROWS[name][0])
    rows = [row | {"rev": rev} for rev in ("HEAD", "workspace") for row in ROWS[name]]
    text = (ROOT / f".dvc/plots/{name}.json").read_text(encoding="utf-8")
    anchors = {"TITLE": settings["title"], "X": settings["x"], "Y": settings["y"]}
    anchors |= {"X_LABEL": settings["x"], "Y_LABEL": settings["y"]}
    text = text.replace('"<DVC_METRIC_DATA>"', json.dumps(rows))
    for anchor, value in anchors.items():
        text = text.replace(f"<DVC_METRIC_{anchor}>", value)
    assert "<DVC" not in text
    svg = vl_convert.vegalite_to_svg(text)
    assert "HEAD" in svg and "workspace" in svg and settings["title"].split(" (")[0] in svg
