"""The saved view in which the charts over the layers come first; without it, MLflow shows a hundred bars first."""

import base64
import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlencode

KEY, TRAININGS = "babelscope", "babelscope-trainings"
# Tags with this prefix are in MLflow's menu of views. Their format is not public (tests/test_mlflow_browser.py passes
# with 3.17.0, 3.17.2 and 3.18.0): a version that does not know it shows the experiment without a view.
_TAG = "mlflow.sharedViewState."
TAG = _TAG + KEY
# A name of this machine in every browser (RFC 6761, 6.3); `ui.main` lets the server accept it.
HOST = "babelscope.localhost"
# The metric that holds the layer. As the x-axis it has this title, instead of MLflow's own "Step".
X_AXIS = "layer"

# Headline figures (metrics/summary.json): the columns of the runs table, and the bars above the lines over the layers.
_HEADLINE = ("features", "dnll_own", "dnll_others", "dnll_control", "selective", "fvu", "loss_recovered", "identified")
# Sections of charts in order (MLflow's own is alphabetical), open or closed. MLflow fills them by the names of the
# metrics, and puts all other sections at the end.
_OPEN = ("headline", "features_by_layer", "dnll_own_by_layer", "fvu_by_layer")
_CLOSED = (
    *("Model metrics", "features", "dnll_own", "nll_clean", "tokens", "l0_by_layer", "tokens_by_layer"),
    *("train_tokens", "train_texts", "eval_tokens", "eval_texts"),
)
_PLAIN = "Model metrics"  # the section of metrics without `/`; trainings have no others
_LIMIT = 5000  # characters of a tag


def saved(series: Mapping[tuple[str, int], float] | None = None, order: Sequence[str] = (), before: str = "") -> str:
    """The value of `TAG`: JSON that contains the deflated state of the page.

    Parameters
    ----------
    series: by name and layer; each `<figure>_by_layer/<language>` gets a chart. Those of a figure share one y-axis.
    order: of the languages' charts.
    before: the view that this one replaces; its y-axes stay inside the new ones, since older runs are drawn, too.
    """
    bars = [_chart("BAR", name, "headline") for name in _HEADLINE]
    title, lines = "Languages over the layers", _lines(series or {}, order, _ranges(before))
    value = _packed(title, "summary", _HEADLINE, bars + lines)
    return value if len(value) < _LIMIT else _packed(title, "summary", _HEADLINE, bars)


def _lines(
    series: Mapping[tuple[str, int], float], order: Sequence[str], ranges: dict[str, list[float]]
) -> list[dict[str, Any]]:
    """A line chart for each language of each figure, in this order, after one of all languages together."""
    kind = {"xAxisKey": "metric", "selectedXAxisMetricKey": X_AXIS, "xAxisScaleType": "linear", "scaleType": "linear",
            "yAxisKey": "metric", "yAxisExpressions": [], "lineSmoothness": 0, "ignoreOutliers": False,
            "useGlobalXaxisKey": True, "useGlobalLineSmoothing": True}  # fmt: skip
    places = {language: place for place, language in enumerate(("all", *order))}
    found = {name: name.rpartition("/")[::2] for name, _ in series if "_by_layer/" in name}
    found = {name: parts for name, parts in found.items() if parts[1] in places}
    for (name, _), value in series.items():
        if name in found and found[name][1] != "all":
            low, high = ranges.setdefault(found[name][0], [0.0, 0.0])
            ranges[found[name][0]] = [min(low, value), max(high, value * 1.05)]  # MLflow cuts the line at the edge
    charts = []
    for name, (figure, language) in sorted(found.items(), key=lambda one: (one[1][0], places[one[1][1]])):
        ends = (None, None) if language == "all" else ranges[figure]
        charts.append({**_chart("LINE", name, figure), **kind, "range": dict(zip(("yMin", "yMax"), ends, strict=True))})
    return charts


def _chart(kind: str, metric: str, section: str) -> dict[str, Any]:
    # Generated: MLflow then adds no second chart of the metric.
    return {"type": kind, "uuid": metric, "metricKey": metric, "metricSectionId": section, "isGenerated": True,
            "deleted": False, "runsCountToCompare": 10}  # fmt: skip


def _ranges(view: str) -> dict[str, list[float]]:
    """The y-axes of a view, by figure."""
    try:
        state = json.loads(zlib.decompress(base64.b64decode(json.loads(view)["state"].partition(";")[2])))
        lines = [chart for chart in state["compareRunCharts"] if chart.get("range", {}).get("yMax") is not None]
        return {chart["metricSectionId"]: [chart["range"]["yMin"], chart["range"]["yMax"]] for chart in lines}
    except (ValueError, KeyError, TypeError, AttributeError, zlib.error):  # none, or from another version of MLflow
        return {}


def _packed(name: str, kind: str, columns: Sequence[str], charts: list[dict[str, Any]]) -> str:
    # Two columns: in MLflow's three, titles are cut off before the language, which distinguishes the charts.
    section = {"isReordered": True, "deleted": False, "isGenerated": True, "columns": 2, "cardHeight": 320}
    bars = {"columns": 4, "cardHeight": 220}
    names = dict.fromkeys([*_OPEN, *_CLOSED, *(chart["metricSectionId"] for chart in charts)] if charts else [_PLAIN])
    state: dict[str, Any] = {
        "searchFilter": f"tags.`babelscope.kind` = '{kind}'",
        "selectedColumns": [f"metrics.`{column}`" for column in columns],
        "compareRunCharts": charts,
        "compareRunSections": [
            {"uuid": name, "name": name, "display": name in _OPEN or not charts}
            | (section | bars if name == "headline" else section)
            for name in names
        ],
        "isAccordionReordered": True,
        "hideEmptyCharts": True,
        "globalLineChartConfig": {"lineSmoothness": 0, "xAxisKey": "step"}
        | ({"xAxisKey": "metric", "selectedXAxisMetricKey": X_AXIS} if kind == "summary" else {}),
    }
    packed = base64.b64encode(zlib.compress(json.dumps(state).encode(), 9)).decode()
    content = {"name": name, "createdAt": 0, "updatedAt": 0, "state": f"deflate;{packed}"}
    return json.dumps(content)


def address(base: str, experiment_id: str, key: str = KEY) -> str:
    """The address of the view on the MLflow server at `base`."""
    # No filter here: MLflow ignores the view if the address itself has one.
    query = {"workflowType": "machine_learning", "compareRunsMode": "CHART", "viewStateShareKey": key}
    return f"{base.rstrip('/')}/#/experiments/{experiment_id}/runs?{urlencode(query)}"


def experiment_tags(experiment_id: str) -> dict[str, str]:
    """The tags of the experiment: its kind, its description with links to the views, and the views."""
    links = [address("", experiment_id, key).removeprefix("/") for key in (KEY, TRAININGS)]
    note = (
        f"One `summary` run per state of the DVC pipeline: [charts over the layers]({links[0]}). One `training` run "
        f"per SAE: [training curves]({links[1]}). Rebuilt from DVC's files by `dvc repro`."
    )
    trainings = _packed("Trainings of the SAEs", "training", ("fvu", "l0", "dead_share"), [])
    # Without a kind, MLflow's pages ask the user what sort of experiment this is, and hide the charts until they know.
    kind = "custom_model_development"
    return {"mlflow.experimentKind": kind, "mlflow.note.content": note, TAG: saved(), _TAG + TRAININGS: trainings}
