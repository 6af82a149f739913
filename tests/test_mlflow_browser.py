"""`make ui` in a browser: its link opens on the charts, two settings lie side by side, the compare page tells why."""

import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlsplit
from urllib.request import urlopen

import pytest
from test_tracking import HOOKPOINTS, LANGUAGES, ROOT, Repo, toy

from babelscope.tracking.summary import note

# Two settings that differ in one param, and what toy_pipeline.py makes of them by hand: features by layer.
SETTINGS = {"4": {"en": [10, 20], "no": [15, 30], "fi": [0, 0]}, "16": {"en": [5, 10], "no": [8, 15], "fi": [0, 0]}}
LAYERS = [int(hookpoint.split(".")[1]) for hookpoint in HOOKPOINTS]
CARD, HEADER = "experiment-view-compare-runs-card", "experiment-view-compare-runs-section-header"


@pytest.fixture(scope="module")
def repo(chromium: Any, tmp_path_factory: pytest.TempPathFactory) -> Repo:
    """A repository in which both settings were run; asks for the browser first, for without it this were in vain."""
    repo = toy(tmp_path_factory.mktemp("mlflow") / "repo")
    for k in SETTINGS:
        repo.set("train", "k", int(k))
        repo.dvc("repro")
    return repo


@pytest.fixture(scope="module")
def address(repo: Repo) -> Iterator[str]:
    """What `make ui` prints, while it serves."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # `-o setup`: these tests run in an environment that is there already.
    command = ["make", "-f", str(ROOT / "Makefile"), "-o", "setup", "ui"]
    command += [f"VENV={Path(sys.executable).parent.parent}", f"PYTHONPATH={ROOT / 'src'}"]
    log = repo.folder / "ui.log"
    with log.open("w") as output:
        ui = subprocess.Popen(
            command, cwd=repo.folder, env=repo.environment(MLFLOW_PORT=str(port)), start_new_session=True,
            stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        wait(ui, f"http://127.0.0.1:{port}/health", log)
        yield re.findall(r"^http://\S+$", log.read_text(), re.MULTILINE)[0]
    finally:
        os.killpg(ui.pid, signal.SIGTERM)  # make, mlflow and its worker
        ui.wait(30)


def wait(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Until the server answers; what it said, where it ends or is silent for two minutes."""
    for _ in range(600):
        try:
            with urlopen(url, timeout=20):
                return
        except URLError:
            assert server.poll() is None, log.read_text()
            time.sleep(0.2)
    pytest.fail(log.read_text())


@pytest.fixture
def page(chromium: Any, address: str) -> Iterator[Any]:
    """The page behind the link; a request to anyone but our server fails the test."""
    # High enough for the charts of all languages: MLflow makes no others than those in view.
    page = chromium.new_page(viewport={"width": 1440, "height": 2000}, color_scheme="light")
    page.set_default_timeout(90_000)  # on a busy machine MLflow's pages come slowly
    asked: set[str] = set()
    page.context.on("request", lambda request: asked.add(urlsplit(request.url).netloc))
    page.goto(address)
    yield page
    assert asked - {""} == {urlsplit(address).netloc}
    page.close()


def test_link_opens_on_the_lines_of_both_settings_over_the_layers(page: Any, repo: Repo) -> None:
    names = {run.params["train.k"]: run.tags["mlflow.runName"] for run in repo.of("summary")}
    assert names.keys() == SETTINGS.keys()
    tops = {}
    for language in LANGUAGES[:2]:  # fi has none
        card = page.get_by_test_id(CARD).filter(has_text=f"features_by_layer/{language}")
        # MLflow draws every line twice, the raw one faint behind the smoothed one; smoothing is off.
        lines = card.locator(".scatterlayer path.js-line:not([style*='stroke-opacity: 0.'])")
        lines.nth(1).wait_for()
        assert lines.count() == 2  # MLflow once drew both in one colour: not asked for
        assert all(line.is_visible() for line in lines.all())
        drawn = card.locator(".js-plotly-plot").evaluate("plot => plot.data.map(one => [one.name, one.x, one.y])")
        expected = [[names[k], LAYERS, counts[language]] for k, counts in SETTINGS.items()]
        assert sorted(drawn) == sorted(2 * expected)
        tops[language] = card.locator(".js-plotly-plot").evaluate("plot => plot.layout.yaxis.range")
        for name in names.values():
            assert name in card.inner_text()
        assert card.locator(".xtitle").text_content() == "layer"
        title = card.get_by_text(f"features_by_layer/{language}", exact=True).first
        assert title.evaluate("one => one.scrollWidth <= one.clientWidth"), "the title is cut off"
    assert page.get_by_text("MLflow Assistant").count() == 0
    headers = [header.inner_text() for header in page.get_by_test_id(HEADER).all()[:2]]
    assert [header.split()[0] for header in headers] == ["headline", "features_by_layer"]
    titles = re.findall(
        r"features_by_layer/(\w+)$", "\n".join(page.get_by_test_id(CARD).all_inner_texts()), re.MULTILINE
    )
    assert titles == ["all", *LANGUAGES]
    assert tops == {"en": [0, 31.5], "no": [0, 31.5]}  # 30 features, and 5 % of space


def test_a_click_on_the_experiment_opens_the_view_without_the_link(chromium: Any, address: str) -> None:
    assert entry_points(group="mlflow.app", name="babelscope"), "installed before it had this app: make setup"
    page = chromium.new_page(viewport={"width": 1440, "height": 2000})
    page.set_default_timeout(90_000)
    page.goto(f"{address.partition('#')[0]}#/experiments")
    page.get_by_role("link", name="toy", exact=True).first.click()
    page.get_by_test_id(CARD).filter(has_text="features_by_layer/en").first.wait_for()
    assert "viewStateShareKey=babelscope&" in page.url
    page.goto("about:blank")
    page.goto(address.partition("#")[0])  # the bare address
    page.get_by_test_id(CARD).filter(has_text="features_by_layer/en").first.wait_for()
    page.close()


def test_the_training_runs_have_a_view_of_their_own(chromium: Any, address: str, repo: Repo) -> None:
    page = chromium.new_page(viewport={"width": 1440, "height": 2000})
    page.set_default_timeout(90_000)
    page.goto(address.replace("viewStateShareKey=babelscope", "viewStateShareKey=babelscope-trainings"))
    page.locator(".ag-row").filter(has_text="SAE layers.").first.wait_for()
    texts = "\n".join(page.locator(".ag-row").all_inner_texts())
    assert not [run for run in repo.of("summary") if run.tags["mlflow.runName"] in texts]
    page.close()


def test_compare_page_shows_the_changed_param_alone(page: Any, repo: Repo) -> None:
    for run in repo.of("summary"):
        row = page.locator(".ag-row").filter(has_text=run.tags["mlflow.runName"])
        row.locator("input.ag-checkbox-input").check()
    page.get_by_test_id("runs-compare-button").click()
    switch = page.get_by_role("switch", name="Parameters - Show diff only")
    switch.wait_for()
    params = repo.of("summary")[0].params
    rows = page.locator(".mlflow-compare-run-table tr").filter(has=page.get_by_role("rowheader"))
    marked = rows.and_(page.locator(".diff-row"))
    assert "train.k" in params and len(params) > 30
    for name in params:
        row = rows.filter(has=page.get_by_role("rowheader", name=name, exact=True))
        assert row.count() == 1, name
        assert row.and_(marked).count() == (name == "train.k"), name
    changed = rows.filter(has=page.get_by_role("rowheader", name="train.k", exact=True))
    assert sorted(changed.locator("td").all_inner_texts(), key=int) == [*SETTINGS]
    switch.click()
    page.get_by_role("rowheader", name="languages", exact=True).wait_for(state="detached")
    names = set(page.locator(".mlflow-compare-run-table th").all_inner_texts())
    assert names & params.keys() == {"train.k"}


def test_markup_in_a_models_name_stays_text_in_the_note(page: Any, repo: Repo, address: str) -> None:
    hostile = "m`<img src=y onerror=window.hacked=1>![](http://127.0.0.1:9/z.png)<script>window.hacked=1</script>"
    run = repo.of("summary")[0].id
    params = {"model": {"name": hostile}, "languages": ["en"], "hookpoints": ["layers.0"], "score": {"members": 1}}
    text = note(params, {}, "1a2b")
    with closing(sqlite3.connect(repo.folder / "mlflow.db")) as connection, connection:
        connection.execute("UPDATE tags SET value = ? WHERE key = 'mlflow.note.content' AND run_uuid = ?", [text, run])
    page.goto(re.sub(r"(#/experiments/\d+).*", rf"\1/runs/{run}", address))
    page.get_by_text("DVC state").wait_for()
    name = page.locator("code").filter(has_text="window.hacked")
    assert name.inner_text() == hostile.replace("`", "'") and page.evaluate("window.hacked") is None
    assert page.locator("img[src='y'], img[src*='127.0.0.1:9']").count() == 0
