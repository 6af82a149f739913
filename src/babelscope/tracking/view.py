"""The saved view in which the charts over the layers come first; without it, MLflow shows a hundred bars first."""

import base64
import json
import zlib
from typing import Any
from urllib.parse import urlencode

KEY = "babelscope"
# The tag that MLflow's menu "Views" reads. Its format is not public (tests/test_mlflow_browser.py passes with 3.17.0,
# 3.17.2 and 3.18.0): a version that does not know it shows the experiment without a view.
TAG = f"mlflow.sharedViewState.{KEY}"
# A name of this machine in every browser (RFC 6761, 6.3); `ui.main` lets the server accept it.
HOST = "babelscope.localhost"
# The metric that holds the layer. As the x-axis it has this title, instead of MLflow's own "Step".
X_AXIS = "layer"

# The columns of the runs table: headline figures (metrics/summary.json).
_COLUMNS = ("features", "dnll_own", "dnll_others", "dnll_control", "selective", "fvu", "loss_recovered", "identified")
# Sections of charts in order (MLflow's own is alphabetical), open or closed. MLflow fills them by the names of the
# metrics, and puts all other sections at the end.
_OPEN = ("features_by_layer", "dnll_own_by_layer", "fvu_by_layer", "Model metrics")
_CLOSED = (
    *("features", "dnll_own", "nll_clean", "tokens", "l0_by_layer", "tokens_by_layer"),
    *("train_tokens", "train_texts", "eval_tokens", "eval_texts"),
)


def saved() -> str:
    """The value of `TAG`: JSON that contains the deflated state of the page."""
    # Two columns: in MLflow's three, titles are cut off before the language, which distinguishes the charts.
    section = {"isReordered": False, "deleted": False, "isGenerated": True, "columns": 2, "cardHeight": 320}
    names = [*((name, True) for name in _OPEN), *((name, False) for name in _CLOSED)]
    state: dict[str, Any] = {
        "searchFilter": "tags.`babelscope.kind` = 'summary'",
        "selectedColumns": [f"metrics.`{name}`" for name in _COLUMNS],
        "compareRunCharts": [],
        "compareRunSections": [{"uuid": name, "name": name, "display": is_open, **section} for name, is_open in names],
        "isAccordionReordered": True,
        "hideEmptyCharts": True,
        "globalLineChartConfig": {"xAxisKey": "metric", "lineSmoothness": 0, "selectedXAxisMetricKey": X_AXIS},
    }
    packed = base64.b64encode(zlib.compress(json.dumps(state).encode(), 9)).decode()
    content = {"name": "Languages over the layers", "createdAt": 0, "updatedAt": 0, "state": f"deflate;{packed}"}
    return json.dumps(content)


def address(base: str, experiment_id: str) -> str:
    """The address of the view on the MLflow server at `base`."""
    # No filter here: MLflow ignores the view if the address itself has one.
    query = {"workflowType": "machine_learning", "compareRunsMode": "CHART", "viewStateShareKey": KEY}
    return f"{base.rstrip('/')}/#/experiments/{experiment_id}/runs?{urlencode(query)}"


def experiment_tags(experiment_id: str) -> dict[str, str]:
    """The tags of the experiment: its kind, its description with a link to the view, and the view."""
    link = address("", experiment_id).removeprefix("/")
    note = (
        f"One `summary` run per state of the DVC pipeline: [charts over the layers]({link}). One `training` run per "
        "SAE. Rebuilt from DVC's files by `dvc repro`."
    )
    # Without a kind, MLflow's pages ask the user what sort of experiment this is, and hide the charts until they know.
    return {"mlflow.experimentKind": "custom_model_development", "mlflow.note.content": note, TAG: saved()}
