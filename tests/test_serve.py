"""`babelscope serve` in a browser: a sentence is typed, its features are shown, and a strength changes what follows."""

import json
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import playground_example as example
import pytest
import stand_ins
import uvicorn

from babelscope import config
from babelscope.core.paths import Paths
from babelscope.playground import server
from babelscope.playground.reading import STRONGEST, Reader
from babelscope.report import browser
from babelscope.report.run import read_features

TURKISH = stand_ins.text("tr", 5, 4, "serve")


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    folder = tmp_path_factory.mktemp("serve")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        example.build(folder)
        params, paths = config.load(), Paths(folder)
        paths.reports.mkdir()
        (paths.reports / "features.html").write_text(browser.build(read_features(params, paths)))
        yield Reader(params, paths)


@pytest.fixture(scope="module")
def address(reader: Reader) -> Iterator[str]:
    app = server.application(reader, Paths(Path.cwd()))
    served = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=served.run)
    thread.start()
    while not served.started:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{served.servers[0].sockets[0].getsockname()[1]}/"
    served.should_exit = True
    thread.join()


def get(address: str, path: str, **values: object) -> tuple[int, Any]:
    try:
        with urllib.request.urlopen(f"{address}{path}?{urllib.parse.urlencode(values)}") as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_a_sentence_is_read_and_continued_as_the_slider_says(address: str, reader: Reader, chromium: Any) -> None:
    page = chromium.new_page(viewport={"width": 1280, "height": 900})
    noticed: list[str] = []
    page.on("console", lambda message: noticed.append(message.text))
    page.on("pageerror", lambda error: noticed.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith(address) else noticed.append(request.url))
    page.goto(address)
    page.wait_for_selector("html[data-ready]")
    assert page.is_hidden("#result")
    page.fill("#text", TURKISH)
    page.keyboard.press("Enter")
    page.wait_for_selector("#continuation[data-strength='0']")
    assert "The features say Turkish (tr)" in page.inner_text("#verdict")
    assert page.inner_text("#pieces").replace("\xa0", " ") == TURKISH
    assert page.text_content("#continuation .new") == reader.continuation(TURKISH, "en", 0.0)

    page.select_option("#target", "ja")
    page.focus("#strength")
    page.keyboard.press("End")
    strongest = STRONGEST
    page.wait_for_selector(f"#continuation[data-strength='{strongest:g}'][data-target='ja']")
    steered = page.text_content("#continuation .new")
    assert steered == reader.continuation(TURKISH, "ja", strongest) != reader.continuation(TURKISH, "ja", 0.0)

    row = page.locator("#features tbody tr").first
    feature = row.get_attribute("data-id")
    row.get_by_role("button").click()
    page.wait_for_selector(f"#continuation[data-target='{feature}']")
    assert page.text_content("#continuation .new") == reader.continuation(TURKISH, feature, strongest)
    with page.context.expect_page() as opened:
        row.get_by_role("link").click()
    opened.value.wait_for_selector("html[data-ready]")
    assert opened.value.url == f"{address}features.html#{feature}"
    assert opened.value.locator("#list tr[aria-current]").get_attribute("data-id") == feature
    assert noticed == []
    page.close()


def test_the_last_place_of_the_slider_wins(address: str, reader: Reader, chromium: Any) -> None:
    page = chromium.new_page()
    page.goto(address)
    page.fill("#text", TURKISH)
    page.click("#ask button")
    page.wait_for_selector("#continuation[data-strength='0']")
    for strength in ("3", "9", "2", "5"):
        page.fill("#strength", strength)
        page.wait_for_timeout(60)
    page.wait_for_selector("#continuation[data-strength='5']:not(.waiting)")
    assert page.text_content("#continuation .new") == reader.continuation(TURKISH, "en", 5.0)
    assert page.inner_text("#amount") == "5.0"
    page.close()


def test_errors_are_shown_on_the_page(address: str, chromium: Any) -> None:
    page = chromium.new_page()
    page.goto(address)
    page.fill("#text", " \n")
    page.click("#ask button")
    page.wait_for_selector("#status.failed")
    assert "the text has no tokens" in page.inner_text("#status") and page.is_hidden("#result")
    page.close()


def test_bad_questions_are_refused(address: str) -> None:
    assert get(address, "read", text="x" * 4001) == (400, {"error": "the text is longer than 4000 characters"})
    for strength in ("nan", "inf", "1e9", ""):
        status, answer = get(address, "continue", text="bir", target="tr", strength=strength)
        assert status == 400 and answer["error"].startswith(f"strength: {strength!r}; allowed: a number")
    assert get(address, "continue", text="bir", target="xx", strength=1)[0] == 400


def test_other_names_of_this_machine_and_missing_pages_are_refused(address: str) -> None:
    for path, host, code in (("", "evil.example.org", 400), ("report.html", None, 404), ("params.yaml", None, 404)):
        request = urllib.request.Request(address + path, headers={"Host": host} if host else {})
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request)
        assert refused.value.code == code
