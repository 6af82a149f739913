"""`babelscope ui`: print the address at which `mlflow ui` shows the charts of the summary runs, and serve it."""

import os
import subprocess
import sys
from contextlib import suppress

from babelscope import config
from babelscope.core.redact import redact
from babelscope.tracking import store, view


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
    sys.stdout.write(ui_url(config.load().track.experiment) + "\n")
    sys.stdout.flush()
    if "MLFLOW_HOST" not in os.environ:
        # MLflow refuses other host names than these.
        os.environ.setdefault("MLFLOW_SERVER_ALLOWED_HOSTS", f"localhost:*,127.0.0.1:*,{view.HOST}:*")
        os.environ.setdefault("MLFLOW_SERVER_CORS_ALLOWED_ORIGINS", f"http://{view.HOST}:*")
    os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    # One worker and no job runner: 0.5 GiB of memory instead of 2.
    with suppress(KeyboardInterrupt):
        sys.exit(subprocess.run([sys.executable, "-m", "mlflow", "ui", "--workers", "1"], check=False).returncode)
