"""The feature browser in a browser: it lists, sorts, filters and shows, in every script, and runs nothing it shows."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browse_example
import polars as pl
import pytest
import report_example as example
from browse_example import SCRIPT
from test_report_features import inputs

from babelscope.report import browser as report

FEATURES = browse_example.frames()["features"].with_columns(
    id=pl.col("hookpoint") + "/" + pl.col("unit").cast(pl.String)
)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("features") / "features.html"
    path.write_text(report.build(inputs()), encoding="utf-8")
    return path


def visit(chromium: Any, file: Path, fragment: str = "", width: int = 1440, scheme: str = "light") -> Any:
    """The page, ready; a word on the console, an error, a dialog or another request is noted in `noticed`."""
    page = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.noticed = []
    page.on("console", lambda message: page.noticed.append(message.text))
    page.on("pageerror", lambda error: page.noticed.append(str(error)))
    page.on("dialog", lambda dialog: (page.noticed.append(dialog.message), dialog.dismiss()))
    page.on(
        "request", lambda request: None if request.url.startswith(file.as_uri()) else page.noticed.append(request.url)
    )
    page.goto(file.as_uri() + fragment)
    page.wait_for_selector("html[data-ready]")
    return page


def listed(page: Any) -> list[str]:
    """The features in the list, from the top as far as rows are drawn."""
    found: list[str] = page.eval_on_selector_all("#list tr[data-id]", "all => all.map(one => one.dataset.id)")
    return found


def count(page: Any) -> str:
    text: str = page.inner_text("#count [role=status]")
    return text


def heading(page: Any) -> str:
    text: str = page.inner_text("#feature h2")
    return text


@pytest.fixture
def page(chromium: Any, file: Path) -> Iterator[Any]:
    page = visit(chromium, file)
    yield page
    assert page.noticed == []
    page.close()


def test_list_is_sorted_by_entropy_and_by_what_is_clicked(page: Any) -> None:
    assert listed(page)[:20] == FEATURES.sort("entropy", maintain_order=True)["id"][:20].to_list()
    assert heading(page) == listed(page)[0]
    page.click("th[data-sort=entropy] button")
    assert page.get_attribute("th[data-sort=entropy]", "aria-sort") == "descending"
    assert listed(page)[0] == FEATURES.sort("entropy", descending=True, maintain_order=True)["id"][0]
    page.click("th[data-sort=delta] button")
    known = FEATURES.filter(pl.col("delta").is_not_null()).sort("delta", descending=True)["id"].to_list()
    assert listed(page)[:10] == known[:10]
    page.click("th[data-sort=delta] button")
    assert listed(page)[:10] == known[::-1][:10]
    page.focus("#list")
    page.keyboard.press("End")
    assert FEATURES.row(by_predicate=pl.col("id") == heading(page), named=True)["delta"] is None
    page.click("th[data-sort=feature] button")
    assert listed(page)[:5] == FEATURES["id"][:5].to_list()


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("language", "he", pl.col("languages").list.contains("he")),
        ("hookpoint", "layers.14.mlp", pl.col("hookpoint") == "layers.14.mlp"),
        ("kind", "shared", pl.col("kind") == "shared"),
    ],
)
def test_filters(page: Any, name: str, value: str, wanted: pl.Expr) -> None:
    page.select_option(f"#filters [name={name}]", value)
    expected = FEATURES.filter(wanted)
    assert sorted(listed(page)) == sorted(expected["id"]) and len(expected) < len(FEATURES)
    assert count(page) == f"{len(expected)} of 60 features"
    assert f"{name}={value}" in page.evaluate("location.hash")
    page.select_option("#filters [name=language]", "vi")
    assert listed(page) == [] and "No feature passes" in page.inner_text("#list tbody")
    assert "No feature passes the filters." in page.inner_text("#feature")
    page.click("text=Show all features")
    assert count(page) == "60 features" and heading(page) == listed(page)[0]


def test_what_is_not_on_a_page_of_a_part_may_be_beyond_its_limit(chromium: Any, tmp_path: Path) -> None:
    (tmp_path / "features.html").write_text(report.build(inputs(selected=100_000)), encoding="utf-8")
    page = visit(chromium, tmp_path / "features.html", "#layers.10.mlp/99999")
    said = page.inner_text("#feature")
    assert "No such feature: layers.10.mlp/99999" in said and "Of 100\u202f000 selected features" in said
    page.fill("#filters [name=words]", "nowhere in any text")
    assert "No feature passes the filters." in (said := page.inner_text("#feature")) and "browse.selected: null" in said
    page.close()


@pytest.mark.parametrize(
    ("words", "wanted"),
    [("WORD17", [17]), ("layers.29.mlp/414", [59]), ("שורשים", None), ("குடும்ப", None), (SCRIPT, None)],
)
def test_search_looks_at_units_tokens_and_texts(page: Any, words: str, wanted: list[int] | None) -> None:
    page.fill("#filters [name=words]", words)
    # A token stands with the three features before the one that is named after it, too.
    ids = listed(page)
    assert 0 < len(ids) <= 60
    if wanted is not None:
        assert FEATURES["id"][wanted[0]] in ids and len(ids) <= 4
    else:
        page.fill("#filters [name=words]", "")
        assert count(page) == "60 features"


def test_a_fragment_names_a_feature_and_back_and_forward_go_between_them(chromium: Any, file: Path) -> None:
    first, second = FEATURES["id"][40], FEATURES["id"][7]
    page = visit(chromium, file, f"#{first}")
    assert heading(page) == first
    assert page.get_attribute("#list tr[aria-current]", "data-id") == first  # it was scrolled to
    page.evaluate("id => { location.hash = id }", second)
    page.wait_for_function("id => document.querySelector('#feature h2').textContent === id", arg=second)
    row = page.locator("#list tr[data-id]").nth(3)
    third = row.get_attribute("data-id")
    row.click()
    page.wait_for_function("id => document.querySelector('#feature h2').textContent === id", arg=third)
    for step, wanted in ((page.go_back, second), (page.go_back, first), (page.go_forward, second)):
        step()
        page.wait_for_function("id => document.querySelector('#feature h2').textContent === id", arg=wanted)
    page.evaluate("location.hash = 'layers.6.mlp/%E0'")
    page.wait_for_function(
        "document.getElementById('feature').textContent.startsWith('No such feature: layers.6.mlp/%E0')"
    )
    assert page.noticed == []
    page.close()


def test_the_address_holds_filters_search_order_and_feature(chromium: Any, file: Path) -> None:
    page = visit(chromium, file, "#language=he&sort=-rate&kind=specific")
    expected = FEATURES.filter(pl.col("languages").list.contains("he"), kind="specific")
    assert sorted(listed(page)) == sorted(expected["id"])
    assert page.get_attribute("th[data-sort=rate]", "aria-sort") == "descending"
    assert heading(page) == "Hebrew (he)" and f"{len(expected)} language-specific features" in page.inner_text(
        "#feature"
    )
    row = page.locator("#list tr[data-id]").nth(1)
    chosen = row.get_attribute("data-id")
    row.click()
    page.wait_for_function("id => document.querySelector('#feature h2').textContent === id", arg=chosen)
    again = visit(chromium, file, page.evaluate("location.hash"))
    assert heading(again) == chosen and listed(again) == listed(page)
    again.close()
    page.go_back()
    page.wait_for_function("document.querySelector('#feature h2').textContent === 'Hebrew (he)'")
    page.fill("#filters [name=words]", "שורשים")
    assert (
        "words=%D7" in page.evaluate("location.hash") and page.locator("#feature mark").first.inner_text() == "שורשים"
    )
    page.evaluate("location.hash = 'hookpoint=layers.14.mlp'")
    page.wait_for_function("document.querySelector('#feature h2').textContent === 'layers.14.mlp'")
    page.click(".counts a >> text=Finnish (fi)")
    page.wait_for_function("document.querySelector('#feature h2').textContent === 'Finnish (fi) · layers.14.mlp'")
    page.evaluate("location.hash = 'language=nn'")  # no such language: all features
    page.wait_for_function("document.querySelector('#count [role=status]').textContent === '60 features'")
    with page.expect_download() as download:
        page.click("#csv")
    rows = pl.read_csv(download.value.path())
    assert len(rows) == 60 and rows["entropy"].is_sorted()
    assert page.noticed == []
    page.close()


def test_arrow_keys_go_through_the_list(page: Any) -> None:
    ids = listed(page)
    page.focus("#list")
    for key, wanted in (("ArrowDown", ids[1]), ("ArrowDown", ids[2]), ("ArrowUp", ids[1]), ("ArrowUp", ids[0])):
        page.keyboard.press(key)
        assert heading(page) == wanted and page.evaluate("location.hash") == f"#{wanted}"
    page.keyboard.press("ArrowUp")
    assert heading(page) == ids[0]
    page.focus("#feature")
    for key, wanted in (("j", ids[1]), ("j", ids[2]), ("k", ids[1])):
        page.keyboard.press(key)
        assert heading(page) == wanted
    page.focus("#list")
    page.keyboard.press("End")
    last = FEATURES.sort("entropy", maintain_order=True)["id"][-1]
    assert heading(page) == last and page.get_attribute("#list tr[aria-current]", "data-id") == last
    page.click("text=← previous")
    assert heading(page) == FEATURES.sort("entropy", maintain_order=True)["id"][-2]


def test_everything_known_of_a_feature_is_shown(chromium: Any, file: Path) -> None:
    row = FEATURES.row(3, named=True)  # Tamil and Japanese
    page = visit(chromium, file, f"#{row['id']}")
    text = page.inner_text("#feature")
    assert "Shared by 2 languages: Tamil (ta), Japanese (ja)" in text
    assert f"{row['entropy']:.3f}" in text and f"{row['delta']:+.4f}".replace("-", "−") in text
    assert "2 held-out texts (31 tokens), 95 % interval" in text
    assert page.locator(".near tr").count() == 2 and "not a feature shown here" in text
    assert "Random texts in which it is less active" in text
    assert page.locator(".rates tr").count() == 15 and page.locator(".rates tr.own").count() == 2
    assert page.locator("svg.histogram rect.own").count() > 15
    assert page.locator(".pair .tokens tr").count() == 8
    texts = page.locator(".texts").first.locator("li")
    assert texts.count() == 2
    pieces = browse_example.TEXTS["ta"]
    assert texts.first.locator("p").inner_text() == "".join(pieces)
    assert texts.first.locator("p span").all_inner_texts() == [pieces[0], *pieces[2:]]
    # The largest activation of the feature is 4: the pieces have 1, none, 3 and 4 of 4.
    assert [one.get_attribute("class") for one in texts.first.locator("p span").all()] == ["a2", "a4", "a5"]
    assert page.noticed == []
    page.close()


def test_hebrew_runs_from_the_right_and_tokens_by_their_own_script(chromium: Any, file: Path) -> None:
    page = visit(chromium, file, f"#{FEATURES['id'][2]}")
    style = "one => [getComputedStyle(one).direction, getComputedStyle(one).unicodeBidi, one.lang]"
    assert page.eval_on_selector(".texts p", style) == ["rtl", "isolate", "he"]  # though it begins with a Latin name
    boxes = [one.bounding_box() for one in page.locator(".texts").first.locator("p span").all()]
    assert boxes[0]["x"] > boxes[1]["x"] > boxes[2]["x"]
    others = page.eval_on_selector_all(".texts p", "all => all.map(one => one.lang + getComputedStyle(one).direction)")
    assert others == ["hertl", "hertl", "enltr", "deltr"]
    tokens = page.eval_on_selector_all(
        ".tokens bdi", "all => Object.fromEntries(all.map(one => [one.textContent, getComputedStyle(one).direction]))"
    )
    assert tokens["␣שלום"] == "rtl" and tokens["word2"] == "ltr" and tokens["word2"] and SCRIPT in tokens
    assert page.noticed == []
    page.close()


def test_markup_in_texts_and_tokens_is_text_and_runs_nowhere(chromium: Any, file: Path) -> None:
    page = visit(chromium, file, f"#{FEATURES['id'][17]}")  # Finnish
    assert page.locator(".texts p").first.inner_text().startswith(SCRIPT)
    assert page.locator(".tokens bdi").nth(1).inner_text() == SCRIPT
    # White space and characters without a form of their own are written out.
    assert page.locator(".tokens bdi").nth(2).inner_text() == "↵ \\u00a0\\u200b"
    page.fill("#filters [name=words]", SCRIPT)
    page.focus("#list")
    page.keyboard.press("ArrowDown")
    assert page.locator("script").count() == 2 and page.evaluate("window.hacked") is None
    assert page.noticed == []
    page.evaluate("document.body.append(Object.assign(document.createElement('script'), {textContent: 'hacked = 1'}))")
    assert page.evaluate("window.hacked") is None  # the policy lets no other script run
    page.close()


@pytest.mark.parametrize(("width", "scheme"), [(1440, "light"), (1440, "dark"), (390, "light"), (390, "dark")])
def test_nothing_scrolls_sideways(chromium: Any, file: Path, width: int, scheme: str) -> None:
    page = visit(chromium, file, f"#{FEATURES['id'][5]}", width, scheme)
    page.eval_on_selector_all("details", "all => all.forEach(one => one.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate("list => list.scrollWidth <= list.clientWidth", page.query_selector("#list"))
    both = [page.locator(part).bounding_box() for part in ("#find", "#feature")]
    beside = both[1]["x"] >= both[0]["x"] + both[0]["width"]
    assert beside == (width == 1440) and (beside or both[1]["y"] >= both[0]["y"] + both[0]["height"])
    assert page.noticed == []
    page.close()


def test_five_thousand_features(chromium: Any, tmp_path: Path) -> None:
    frames = browse_example.frames(5000)
    file = tmp_path / "features.html"
    file.write_text(report.build(inputs(frames)), encoding="utf-8")
    page = visit(chromium, file)
    assert count(page) == "5\u202f000 features"
    assert len(listed(page)) < 100  # only what can be seen is in the page
    page.focus("#list")
    page.keyboard.press("End")
    assert heading(page) == page.get_attribute("#list tr[aria-current]", "data-id") == listed(page)[-1]
    page.evaluate("document.getElementById('list').scrollTop = 75000")
    middle = frames["features"].sort("entropy", maintain_order=True).with_row_index()[2500]
    name = f"{middle['hookpoint'][0]}/{middle['unit'][0]}"
    page.wait_for_selector(f'#list tr[data-id="{name}"]')
    page.fill("#filters [name=words]", "word4321")
    assert 0 < len(listed(page)) <= 4
    page.fill("#filters [name=words]", "")
    page.select_option("#filters [name=language]", "ta")
    expected = frames["features"].filter(pl.col("languages").list.contains("ta")).height
    assert count(page) == f"{expected} of 5\u202f000 features"
    assert page.noticed == []
    page.close()


def test_no_feature_at_all(chromium: Any, tmp_path: Path) -> None:
    none = {name: frame.clear() for name, frame in browse_example.frames(12).items()}
    file = tmp_path / "features.html"
    file.write_text(report.build(inputs(none, languages=example.LANGUAGES)), encoding="utf-8")
    page = visit(chromium, file)
    assert count(page) == "0 features" and page.inner_text("#feature") == "There is no feature."
    assert page.noticed == []
    page.close()
