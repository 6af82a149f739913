"""The report in a browser: it draws, explains itself under the pointer, fits a phone, and asks nobody for anything."""

import dataclasses
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import report_example as example
from test_report import SCRIPT, inputs, small

from babelscope.report import page as report


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(report.build(inputs()), encoding="utf-8")
    return path


def visit(chromium: Any, file: Path, width: int = 1440, scheme: str = "light") -> Any:
    """The page, drawn; a word on the console, an error or a request other than for the file itself fails the test."""
    page = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.noticed = []
    page.on("console", lambda message: page.noticed.append(message.text))
    page.on("pageerror", lambda error: page.noticed.append(str(error)))
    page.on("request", lambda request: None if request.url == file.as_uri() else page.noticed.append(request.url))
    page.goto(file.as_uri())
    page.wait_for_selector(f"html[data-drawn={scheme}]", timeout=30_000)
    assert page.noticed == []
    return page


@pytest.mark.parametrize(("width", "scheme"), [(1440, "light"), (1440, "dark"), (390, "light"), (390, "dark")])
def test_every_chart_is_drawn_and_the_body_never_scrolls_sideways(
    chromium: Any, file: Path, width: int, scheme: str
) -> None:
    page = visit(chromium, file, width, scheme)
    boxes = page.eval_on_selector_all(
        "[data-chart]", "all => all.map(one => one.querySelector('svg').getBoundingClientRect().toJSON())"
    )
    assert len(boxes) == 15
    assert all(box["width"] > 200 and box["height"] > 60 for box in boxes)
    page.eval_on_selector_all("details", "all => all.forEach(one => one.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    page.evaluate("window.scrollTo(500, 0)")
    assert page.evaluate("window.scrollX") == 0
    assert page.noticed == []
    page.close()


def cell(page: Any, chart: str, *words: str) -> Any:
    """The cell whose description (aria-label) holds `words`."""
    selector = "".join(f'[aria-label*="{word}"]' for word in words)
    return page.locator(f'[data-chart="{chart}"] path{selector}').first


def test_pointer_on_a_cell_shows_its_figures(chromium: Any, file: Path) -> None:
    page = visit(chromium, file)
    cell(page, "ablation", "removed: tr;", "evaluated: tr;").hover(force=True)  # the figure in the cell lies above it
    page.wait_for_selector("#vg-tooltip-element.visible")
    shown = page.inner_text("#vg-tooltip-element")
    row = example.nll().filter(ablated="tr", evaluated="tr").row(0, named=True)
    for text in ("tr", f"{row['delta']:+.5f}", f"{row['low']:+.5f}", f"{row['high']:+.5f}", f"{row['tokens']:,}"):
        assert text in shown
    cell(page, "features", "hookpoint: layers.26.mlp", "language: fi").hover(force=True)
    page.wait_for_function("document.querySelector('#vg-tooltip-element').innerText.includes('layers.26.mlp')")
    assert page.noticed == []
    page.close()


def test_counts_are_written_into_the_cells(chromium: Any, file: Path) -> None:
    page = visit(chromium, file)
    written = page.eval_on_selector_all('[data-chart="features"] svg text', "all => all.map(one => one.textContent)")
    counts = example.features().group_by("language", "hookpoint").len()["len"].to_list()
    missing = [str(count) for count in counts if str(count) not in written]
    assert missing == [] and written.count("0") >= 7 + 6  # ta has nothing, ru a single feature
    page.close()


def test_colours_follow_the_reader(chromium: Any, file: Path) -> None:
    page = visit(chromium, file)
    colour = 'document.querySelector(\'[data-chart="features"] svg .role-axis-label text\').getAttribute("fill")'
    light = page.evaluate(colour)
    page.emulate_media(color_scheme="dark")
    page.wait_for_selector("html[data-drawn=dark]")
    assert page.evaluate(colour) != light
    assert page.locator("[data-chart] svg").count() == 15
    assert page.noticed == []
    page.close()


def test_the_keyboard_reaches_what_scrolls(chromium: Any, file: Path) -> None:
    page = visit(chromium, file, width=390)
    unreachable = page.evaluate(
        "[...document.querySelectorAll('body *')].filter(one => getComputedStyle(one).overflowX == 'auto'"
        " && one.tabIndex < 0).map(one => one.outerHTML.slice(0, 80))"
    )
    assert unreachable == []
    page.close()


def test_markup_in_the_data_is_text(chromium: Any, tmp_path: Path) -> None:
    params = example.params()
    params["model"]["name"] = SCRIPT
    params["languages"] = [SCRIPT, *params["languages"]]
    nll = pl.concat([example.nll(), small([(SCRIPT, SCRIPT, 0.2)])], how="diagonal_relaxed")
    file = tmp_path / "report.html"
    file.write_text(report.build(dataclasses.replace(inputs(), params=params, nll=nll)), encoding="utf-8")
    page = chromium.new_page()
    dialogs: list[str] = []
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    page.goto(file.as_uri())
    page.wait_for_selector("html[data-drawn]", timeout=30_000)
    assert SCRIPT in page.inner_text(".eyebrow")
    assert SCRIPT in page.inner_text("#params")
    assert SCRIPT in page.locator("#corpus tbody th").first.inner_text()
    cell(page, "ablation", "removed: <script>", "evaluated: <script>").hover(force=True)
    page.wait_for_selector("#vg-tooltip-element.visible")
    assert SCRIPT in page.inner_text("#vg-tooltip-element")
    assert dialogs == []
    page.close()


def test_charts_and_tables_can_be_downloaded_and_cells_lead_to_features(chromium: Any, file: Path) -> None:
    page = visit(chromium, file, scheme="dark")
    for kind, start in (("SVG", b"<svg"), ("PNG", b"\x89PNG")):
        with page.expect_download() as download:
            page.click(f"#own .picture .tools >> text={kind}")
        assert download.value.suggested_filename == f"own.{kind.lower()}"
        assert download.value.path().read_bytes().startswith(start)
    page.eval_on_selector_all("details", "all => all.forEach(one => one.open = true)")
    with page.expect_download() as download:
        page.click("#own details .tools >> text=CSV")
    table = pl.read_csv(download.value.path())
    own = example.nll().filter(pl.col("ablated") == pl.col("evaluated"))
    assert table["language"].to_list() == example.LANGUAGES
    assert table["ΔNLL of itself"].to_list() == pytest.approx(own["delta"].to_list(), abs=1e-4)
    page.fill("#reproduce .tools input", "train.layers.26 dead_share")
    shown = page.locator("#reproduce .tools:has(input) + .scroll tbody tr:visible")
    assert shown.count() == 1 and "0.02" in shown.first.inner_text()
    cell = page.locator('[data-chart="features"] path[aria-label*="language=fi&hookpoint=layers.26.mlp"]').first
    cell.scroll_into_view_if_needed()
    corner = cell.bounding_box()
    (file.parent / "features.html").write_text("<title>the browser</title>")
    page.mouse.click(corner["x"] + 3, corner["y"] + 3)
    page.wait_for_url("**/features.html#language=fi&hookpoint=layers.26.mlp")
    page.close()


def test_the_names_of_rows_stay_where_a_chart_scrolls(chromium: Any, file: Path) -> None:
    page = visit(chromium, file, width=390)
    scroll = page.locator("#ablation .scroll").first
    name = page.locator("#ablation svg text", has_text="Turkish (tr)").first
    before = name.bounding_box()["x"]
    scroll.evaluate("one => { one.scrollLeft = 200; }")
    page.wait_for_timeout(100)
    assert name.bounding_box()["x"] == pytest.approx(before, abs=2)
    page.close()


def test_the_policy_lets_no_other_script_run_and_nothing_be_fetched(chromium: Any, file: Path) -> None:
    page = visit(chromium, file)
    blocked: list[str] = []
    page.on("requestfailed", lambda request: blocked.append(f"{request.url} {request.failure}"))
    page.evaluate(
        "document.body.insertAdjacentHTML('beforeend', '<img src=https://example.invalid/x onerror=window.hacked=1>')"
    )
    page.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.hacked = 1'}))"
    )
    page.wait_for_timeout(300)
    assert page.evaluate("window.hacked") is None
    assert blocked == ["https://example.invalid/x csp"]
    page.close()
