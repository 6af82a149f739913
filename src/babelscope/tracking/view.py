"""The saved view with which MLflow opens on the charts over the layers; without it they lie below a hundred bars."""

import base64
import json
import zlib
from urllib.parse import urlencode

KEY = "babelscope"
FILTER = "tags.`babelscope.kind` = 'summary'"

# Of this machine in every browser (RFC 6761, 6.3); the Makefile allows it to the server.
HOST = "babelscope.localhost"
# The metric that holds the layer itself: an axis titled so, where MLflow's own would be titled "Step".
X_AXIS = "layer"

# Sections of charts in their order (MLflow's is the alphabet), open or closed. MLflow fills them by the metrics'
# names, and puts those that are not named here at the end.
_OPEN = ("features_by_layer", "dnll_own_by_layer", "fvu_by_layer", "Model metrics")
_CLOSED = (
    *("features", "dnll_own", "nll_clean", "tokens", "l0_by_layer", "tokens_by_layer"),
    *("train_tokens", "train_texts", "eval_tokens", "eval_texts"),
)


def tag() -> dict[str, str]:
    """The experiment tag that MLflow 3.17's menu "Views" reads: JSON around a deflated state of the page."""
    # MLflow's three columns cut the titles off, which end in what tells the charts apart: the language.
    section = {"isReordered": False, "deleted": False, "isGenerated": True, "columns": 2, "cardHeight": 320}
    state = {
        "searchFilter": FILTER,
        "compareRunCharts": [],
        "compareRunSections": [
            {"uuid": name, "name": name, "display": name in _OPEN, **section} for name in (*_OPEN, *_CLOSED)
        ],
        "isAccordionReordered": True,
        "hideEmptyCharts": True,
        "globalLineChartConfig": {"xAxisKey": "metric", "lineSmoothness": 0, "selectedXAxisMetricKey": X_AXIS},
    }
    packed = base64.b64encode(zlib.compress(json.dumps(state).encode(), 9)).decode()
    content = {"name": "Languages over the layers", "createdAt": 0, "updatedAt": 0, "state": f"deflate;{packed}"}
    return {f"mlflow.sharedViewState.{KEY}": json.dumps(content)}


def address(base: str, experiment_id: str) -> str:
    """The address of the view on the MLflow server at `base`."""
    # No filter here: MLflow ignores the view where the address itself has one.
    query = {"workflowType": "machine_learning", "compareRunsMode": "CHART", "viewStateShareKey": KEY}
    return f"{base.rstrip('/')}/#/experiments/{experiment_id}/runs?{urlencode(query)}"
