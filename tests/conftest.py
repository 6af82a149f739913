"""One headless Chromium per file, for the tests of pages; and the files that take longest first."""

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync"]  # fmt: skip

# Two processes share the files, in this order (see `make test`): one that starts last would be waited for alone.
LONGEST = [
    "test_end_to_end.py",
    "test_experiments_run.py",
    "test_stream_divided.py",
    "test_tracking.py",
    "test_concurrency.py",
    "test_mlflow_browser.py",
    "test_sae_distributed.py",
    "test_knobs_run.py",
    "test_cluster.py",
    "test_extraction_distributed.py",
    "test_planted_truth.py",
    "test_warm_server.py",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files before all others."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A browser; skips every test that asks for it where playwright or Chromium is missing."""
    sync_api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on PATH")
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()
