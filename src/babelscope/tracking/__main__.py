"""`python -m babelscope.tracking`: print the address at which `mlflow ui` shows the charts of the summary runs."""

import os
import sys

from babelscope import config
from babelscope.core import stage
from babelscope.core.redact import redact
from babelscope.tracking import store, view


def ui_url(experiment: str) -> str:
    """The address of the chart view of the experiment's summary runs.

    On the server that `MLFLOW_TRACKING_URI` names, else where `mlflow ui` listens (`MLFLOW_HOST`, `MLFLOW_PORT`). Its
    default, 127.0.0.1, is called by another name of this machine: on a page from there or from `localhost` MLflow
    opens its Assistant, which covers a third of the charts.
    """
    base = redact(os.environ.get("MLFLOW_TRACKING_URI", ""))
    if not base.startswith("http"):
        base = f"http://{os.environ.get('MLFLOW_HOST', view.HOST)}:{os.environ.get('MLFLOW_PORT', '5000')}"
    return view.address(base, store.open_store(experiment).experiment_id)


def main() -> None:
    """Print the address for the experiment that params.yaml names."""
    sys.stdout.write(ui_url(config.load().track.experiment) + "\n")


if __name__ == "__main__":
    stage.run(main)
