"""What `dvc plots` draws: every file has a template, and with data in it each is a chart that Vega-Lite renders."""

import json
from pathlib import Path
from typing import Any

import pytest
import vl_convert
from closure import ROOT
from configobj import ConfigObj
from dvc_render.html import HTML
from dvc_render.vega import VegaRenderer
from ruamel.yaml import YAML

from babelscope.report.page import for_dvc

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


def drawn(path: str) -> str:
    """The chart of a plot, of two revisions, as DVC makes it of our template."""
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
    return text


@pytest.mark.parametrize("path", PLOTS)
def test_templates_draw(path: str) -> None:
    svg = vl_convert.vegalite_to_svg(drawn(path))
    assert "HEAD" in svg and "workspace" in svg and PLOTS[path]["title"].split(" (")[0] in svg


def test_the_page_of_dvc_plots_draws_them_without_a_network(chromium: Any, tmp_path: Path) -> None:
    # Relative to .dvc; in git, so that a fresh clone has it.
    template = ROOT / ".dvc" / ConfigObj(str(ROOT / ".dvc/config"))["plots"]["html_template"]
    assert template.read_text(encoding="utf-8") == for_dvc()
    partial = [VegaRenderer.DIV.format(id=f"plot{i}", partial=drawn(path)) for i, path in enumerate(PLOTS)]
    html = HTML(template.read_text(encoding="utf-8")).with_scripts(VegaRenderer.SCRIPTS)
    for div in partial:
        html.with_element(div)
    (file := tmp_path / "index.html").write_text(html.embed(), encoding="utf-8")
    page = chromium.new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(file.as_uri())
    for i in range(len(PLOTS)):
        page.locator(f"#plot{i} canvas, #plot{i} svg.marks").first.wait_for()
    assert asked == [file.as_uri()]
    page.close()
