"""`babelscope ui`: print the address at which `mlflow ui` shows the charts of the summary runs, and serve it."""

import json
import os
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import entry_points
from typing import Any

from babelscope import config
from babelscope.core.redact import redact
from babelscope.tracking import store, view

# The name of `app` among MLflow's apps (pyproject.toml).
APP = "babelscope"
# By this variable, `main` tells `app` the fragment of the view's address.
_VIEW = "BABELSCOPE_VIEW"
# Gets the fragments of the addresses of the experiment and of the view.
_SCRIPT = """<script>
(([experiment, view]) => {
  if (!location.hash) location.hash = view;
  addEventListener("click", (event) => {
    const link = event.target.closest?.("a");
    if (link?.hash.split("?")[0] !== experiment || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    event.stopPropagation();
    location.hash = view;
  }, true);
})(%s);
</script>"""


def ui_url(experiment: str) -> str:
    """The address of the chart view of the experiment's summary runs.

    It is on the server of `MLFLOW_TRACKING_URI`, else on the host and port of `mlflow ui` (`MLFLOW_HOST`,
    `MLFLOW_PORT`). The default host is `view.HOST`, another name of 127.0.0.1: on pages from 127.0.0.1 or `localhost`,
    MLflow 3.17 opens its Assistant, which covers a third of the charts.
    """
    base = redact(os.environ.get("MLFLOW_TRACKING_URI", ""))
    if not base.startswith("http"):
        base = f"http://{os.environ.get('MLFLOW_HOST', view.HOST)}:{os.environ.get('MLFLOW_PORT', '5000')}"
    return view.address(base, store.open_store(experiment).experiment_id)


def main() -> None:
    """Print the address for the experiment that params.yaml names, and run `mlflow ui` until it is interrupted."""
    url = ui_url(config.load().track.experiment)
    sys.stdout.write(url + "\n")
    sys.stdout.flush()
    os.environ[_VIEW] = url.partition("#")[2]
    if "MLFLOW_HOST" not in os.environ:
        # MLflow refuses other host names than these.
        os.environ.setdefault("MLFLOW_SERVER_ALLOWED_HOSTS", f"localhost:*,127.0.0.1:*,{view.HOST}:*")
        os.environ.setdefault("MLFLOW_SERVER_CORS_ALLOWED_ORIGINS", f"http://{view.HOST}:*")
    os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    # One worker and no job runner: 0.5 GiB of memory instead of 2.
    command = [sys.executable, "-m", "mlflow", "ui", "--workers", "1"]
    if entry_points(group="mlflow.app", name=APP):  # of this package, if it was installed since it has one
        command += ["--app-name", APP]
    with suppress(KeyboardInterrupt):
        sys.exit(subprocess.run(command, check=False).returncode)


def app() -> Any:
    """MLflow's own app, in which a click on the experiment opens the view, as its bare address does.

    MLflow 3.17 opens an experiment on pages for traces, whatever its tag `mlflow.experimentKind` says, unless its
    address or the browser's memory says otherwise. An app of its own is MLflow's public way to change its pages.
    """
    from flask import request
    from mlflow.server import app as pages
    from mlflow.server.fastapi_app import app as served

    view = os.environ[_VIEW]
    script = _SCRIPT % json.dumps([f"#{view.partition('/runs?')[0]}", f"#{view}"])

    @pages.after_request  # type: ignore[untyped-decorator]
    def extend(response: Any) -> Any:
        if request.path == "/" and response.status_code == 200:
            response.direct_passthrough = False
            response.set_data(response.get_data(as_text=True).replace("<head>", f"<head>{script}", 1))
        return response

    return served
