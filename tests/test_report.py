"""The report: its frames by hand, its page as text, its stage as a process."""

import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import browse_example
import polars as pl
import pytest
import report_example as example
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML

from babelscope.core.errors import UserError
from babelscope.core.files import write_atomically
from babelscope.core.paths import Paths
from babelscope.report import about, charts, page, run
from babelscope.report.numbers import NONE, p_value, percent, plain, significant
from babelscope.report.parts import Picture, ReportInputs, Table, browser_link, layer_labels
from babelscope.report.relatives import means_by_relation, relatives
from babelscope.report.sections import (
    ablation,
    baselines,
    control,
    curve,
    features,
    identification,
    layers,
    own,
    quality,
    script,
    sharing,
    similarity,
    steering,
    switching,
)

ROOT = Path(__file__).parent.parent
SCRIPT = "<script>alert('x')</script>"


def inputs(**changes: Any) -> ReportInputs:
    given_ = ReportInputs(
        params=example.params(), features=example.features(), nll=example.nll(), by_layer=example.by_layer(),
        metrics=example.metrics(), files={"data/scores/features.parquet": "0" * 32}, versions={"torch": "2.13.0"},
        control=example.control(), curve=example.curve(), confusion=example.confusion(),
        generations=example.generations(), similarity=example.similarity(),
        baselines=example.baselines(), script=example.script(), sharing=example.sharing(),
        switching=example.switching(), switch_positions=example.switch_positions(),
    )  # fmt: skip
    return dataclasses.replace(given_, **changes)


@pytest.fixture(scope="module")
def html() -> str:
    return page.build(inputs())


def specs_of(html: str) -> dict[str, Any]:
    text = re.search(r'<script type="application/json" id="charts">(.*?)</script>', html, re.DOTALL)
    assert text is not None
    content: dict[str, Any] = json.loads(text.group(1))
    return content["specs"]


class Page(HTMLParser):
    """What a browser makes of the page: its tags with their attributes, and the text of its first table cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


# --- numbers


@pytest.mark.parametrize(
    ("value", "decimals", "sign", "text"),
    [(1234567, 0, False, "1\u202f234\u202f567"), (0.164, 2, True, "+0.16"), (-0.5, 1, False, "−0.5"),
     (-0.0004, 2, True, "0"), (None, 2, False, "–"), (float("nan"), 2, False, "–"), ("text", 2, False, "text"),
     (0, 2, False, "0")],
)  # fmt: skip
def test_plain(value: Any, decimals: int, sign: bool, text: str) -> None:
    assert plain(value, decimals, sign=sign) == text


def test_significant_and_percent() -> None:
    assert significant(0.16789, sign=True) == "+0.168"
    assert significant(0.00054321, digits=2) == "0.00054"
    assert significant(123.4) == "123"
    assert percent(0.0312) == "3.1\u202f%"
    assert percent(None) == "–"
    known = [p_value(p) for p in (1.0, 0.5488, 1e-4, 2e-24, 0, None)]
    assert known == ["1.0", "0.55", "0.00010", "< 0.0001", "< 0.0001", "–"]


@given(st.floats(allow_nan=False, allow_infinity=False, min_value=1e-3, max_value=1e9))
def test_significant_is_near_the_value(value: float) -> None:
    assert float(significant(value).replace("\u202f", "")) == pytest.approx(value, rel=0.01)


# --- frames


def test_counts_fill_the_whole_grid_in_the_order_of_params() -> None:
    frame = features.counts(inputs())
    assert frame.height == 15 * 7
    assert frame["language"].unique(maintain_order=True).to_list() == example.LANGUAGES
    assert frame["layer"][:7].to_list() == ["6", "10", "14", "18", "22", "26", "29"]
    assert frame.filter(language="ta")["value"].to_list() == [0] * 7
    assert frame.filter(language="ru")["value"].to_list() == [0, 0, 1, 0, 0, 0, 0]
    totals = frame.group_by("hookpoint", maintain_order=True).agg(pl.col("value").sum())["value"].to_list()
    assert totals == [68, 73, 105, 116, 132, 257, 157]


def test_a_row_with_a_null_unit_is_no_feature() -> None:
    assert features.counts(inputs(features=example.features(null_row=True))).equals(features.counts(inputs()))


def test_no_features_at_all() -> None:
    none = inputs(features=example.features().clear())
    assert features.counts(none)["value"].sum() == 0
    assert features.found(none) == 0
    assert "0 language-specific features: without" in page.build(none)


def test_a_shared_feature_counts_once_in_all_and_once_per_language() -> None:
    one = example.features().head(1)
    shared = inputs(features=pl.concat([one.with_columns(language=pl.lit(name)) for name in ("en", "de")]))
    assert features.found(shared) == 1
    assert features.counts(shared)["value"].sum() == 2


def test_features_of_other_kinds_languages_and_hookpoints_are_left_out() -> None:
    one = example.features().head(1)
    extra = [one.with_columns(kind=pl.lit("neuron")), one.with_columns(language=pl.lit("xx")),
             one.with_columns(hookpoint=pl.lit("layers.1.mlp"))]  # fmt: skip
    assert features.counts(inputs(features=pl.concat([example.features(), *extra]))).equals(features.counts(inputs()))


def test_layer_labels_fall_back_on_the_whole_name() -> None:
    assert layer_labels(["layers.6.mlp", "layers.6"]) == {"layers.6.mlp": "layers.6.mlp", "layers.6": "layers.6"}
    assert layer_labels(["layers.6.mlp", "embed"]) == {"layers.6.mlp": "layers.6.mlp", "embed": "embed"}


def small(rows: list[tuple[str, str, float]], **columns: Any) -> pl.DataFrame:
    frame = pl.DataFrame(rows, schema=["ablated", "evaluated", "delta"], orient="row")
    values = {"method": "feature", "kind": "sae", "control": None, "nll": 1.0, "tokens": 9, "low": None, "high": None}
    return frame.with_columns(**{key: pl.lit(value) for key, value in (values | columns).items()})


def two_languages(nll: pl.DataFrame) -> ReportInputs:
    return inputs(params=example.params() | {"languages": ["b", "a"]}, nll=nll, by_layer=None)


def test_matrix_and_own_against_others_by_hand() -> None:
    cells = small([("a", "a", 0.5), ("a", "b", 0.1), ("b", "a", 0.3), ("b", "b", 0.2)])
    control = small([("a", "a", 0.01), ("b", "b", 0.02)], control=0)
    again = small([("a", "a", 0.03), ("b", "b", 0.02)], control=1)
    other = small([("a", "a", 9.0)], method="additive")
    given_ = two_languages(pl.concat([cells, control, again, other], how="vertical_relaxed"))
    matrix = ablation.matrix(given_)
    assert matrix.select("ablated", "evaluated", "value", "own", "largest").rows() == [
        ("b", "b", 0.2, True, False), ("b", "a", 0.3, False, True),
        ("a", "b", 0.1, False, False), ("a", "a", 0.5, True, True),
    ]  # fmt: skip
    rows = own.own_and_others(given_).select("language", "own", "others", "random").rows()
    assert rows == [("b", 0.2, 0.3, 0.02), ("a", 0.5, 0.1, pytest.approx(0.02))]
    assert ablation.method(given_) == "feature"


def test_a_language_that_was_not_ablated_is_an_empty_row() -> None:
    given_ = two_languages(small([("a", "a", 0.5), ("a", "b", 0.0)]))
    assert ablation.table(given_).rows == [["b", "–", "–"], ["a", "0", "0.5000*"]]
    assert own.own_and_others(given_)["own"].to_list() == [None, 0.5]
    assert specs_of(page.build(given_))["ablation"]["layer"]


def test_own_by_layer() -> None:
    frame = layers.own_by_layer(inputs())
    source = example.by_layer().filter(ablated="tr", evaluated="tr", hookpoint="layers.26.mlp")
    cell = frame.filter(language="tr", hookpoint="layers.26.mlp")
    assert cell.select("value", "low", "high").rows() == source.select("delta", "low", "high").rows()
    assert layers.own_by_layer(inputs(by_layer=None)).is_empty()
    assert layers.own_by_layer(inputs(by_layer=example.by_layer().clear())).is_empty()


def test_selectivity_of_each_hookpoint_alone_by_hand() -> None:
    cells = {6: {"aa": 0.3, "ab": 0.1, "ba": 0.05, "bb": 0.2}, 26: {"aa": 0.2, "ab": 0.4, "ba": -0.2, "bb": 0.0}}
    by_layer = pl.concat(
        [
            small([(*pair, delta) for pair, delta in pairs.items()], hookpoint=f"layers.{layer}.mlp")
            for layer, pairs in cells.items()
        ]
    )
    given_ = dataclasses.replace(two_languages(small([("a", "a", 0.5)])), by_layer=by_layer)
    found = layers.selectivity(layers.own_by_layer(given_)).drop_nulls()
    assert found["hookpoint"].to_list() == ["layers.6.mlp", "layers.26.mlp"]
    assert found["own"].to_list() == pytest.approx([0.25, 0.1])
    assert found["others"].to_list() == pytest.approx([0.075, 0.1])
    assert found["rows"].to_list() == [2, 0]  # in layer 26 a's cost b more, b's own cost it nothing
    table = layers.selective_table(given_)
    assert [row[2:] for row in table.rows if row[0] == "layers.6.mlp"] == [["+0.2500", "+0.07500", "2 of 2"]]
    # With the owners alone evaluated there is nothing to compare with.
    own = dataclasses.replace(given_, by_layer=by_layer.filter(pl.col("ablated") == pl.col("evaluated")))
    found = layers.selectivity(layers.own_by_layer(own))
    assert found["own"].count() == 2 and found["others"].count() == found["rows"].count() == 0
    drawn = [len(specs_of(page.build(one))["layers"]["vconcat"][1]["layer"]) for one in (given_, own)]
    assert drawn == [4, 2]


def test_the_curve_is_the_mean_of_the_languages_by_the_number_of_features() -> None:
    frame = curve.means(inputs(curve=example.curve().with_columns(control=pl.lit(None, pl.Float64))))
    assert frame["top"].to_list() == ["1", "2", "5", "10", "all"] and frame["control"].null_count() == 5
    assert frame["own"].to_list() == pytest.approx([0.02, 0.04, 0.1, 0.2, 0.25])
    assert frame["low"][:4].to_list() == pytest.approx([0.01, 0.03, 0.09, 0.19])
    first = curve.table(inputs()).rows[0]
    assert first[1:] == ["84", "+0.0200", "+0.0400", "+0.1000", "+0.2000", "+0.2500", "10"]
    assert curve.section(inputs(curve=None)) is None


def test_against_control_has_both_questions_of_every_language() -> None:
    frame = control.against_control(inputs(control=example.control().filter(pl.col("language") != "ja")))
    assert frame.select("language", "question").rows() == [
        (name, question) for name in example.LANGUAGES for question in ("own", "selective")
    ]
    de = frame.filter(language="de").select("value", "low", "high").rows()
    assert de == [pytest.approx((0.08, 0.03, 0.14)), pytest.approx((0.11, 0.06, 0.16))]
    assert frame.filter(language="ja")["value"].to_list() == [None, None]
    other = example.control().with_columns(method=pl.lit("neuron"))
    assert control.against_control(inputs(control=other))["value"].null_count() == 30
    assert control.against_control(inputs(control=None)).is_empty()


def test_confusion_is_in_shares_of_a_languages_texts() -> None:
    frame = identification.confusion(inputs())
    assert frame["method"].unique(maintain_order=True).to_list() == ["features", "fastText"]
    assert frame.filter(method="features", language="ru", predicted="bg").select("texts", "value").row(0) == (2, 2 / 30)
    assert frame.filter(method="fastText", language="ru", predicted="ru")["texts"].item() == 29
    assert [row[:4] for row in identification.table(frame).rows] == [
        ["features", "ru", "bg", "2"], ["fastText", "ru", "bg", "1"],
    ]  # fmt: skip
    assert identification.confusion(inputs(confusion=None)).is_empty()
    assert identification.confusion(inputs(confusion=example.confusion().clear())).is_empty()


def test_translations_share_latents_by_layer_and_relation() -> None:
    frame = sharing.by_layer(inputs())
    assert frame["layer"].to_list() == [str(layer) for layer in example.LAYERS]
    assert frame["random"].to_list() == pytest.approx([0.1] * len(frame))
    assert sharing.steered(frame) == (example.HOOKPOINTS[4], "0.50")
    means = means_by_relation(sharing.excess(inputs()).select("relation", value="excess"))
    assert means["same branch"] > means["neither"] == pytest.approx(means["same script, other branch"])
    assert sharing.pairs(inputs()).rows[0][:2] == ["pt-BR", "es"]
    assert sharing.section(inputs(sharing=None)) is None
    assert sharing.section(inputs(sharing=example.sharing().clear())) is None


def test_what_happens_where_a_sentence_switches() -> None:
    frame = switching.profile(inputs())
    assert frame["position"].to_list() == list(range(-4, 5))
    assert frame["intruder"].to_list() == [0.0] * 4 + [1.0] * 5
    assert frame["host"].to_list() == [0.5] * 9 and frame["alone"].to_list() == pytest.approx([0.9] * 9)
    table = switching.pairs(inputs())
    assert table.rows[0] == ["en", "fi", "20", "+2.00", "+2.00", "+1.10", "+0.10", "\u22120.20", "+1.50",
                             "+0.5000 to +1.5000"]  # fmt: skip
    section = switching.section(inputs())
    assert section is not None and section.title.endswith("costs +1.07 nats per token more")
    # Transcoders: nothing was removed.
    some = switching.section(inputs(switching=example.switching().clear(), metrics={}))
    assert some is not None and len(some.blocks) == 1
    assert switching.section(inputs(switching=None, switch_positions=None)) is None
    assert switching.section(inputs(switch_positions=example.switch_positions().clear())) is None


def test_languages_that_are_alike_stand_side_by_side() -> None:
    frame = similarity.similarity(inputs())
    order = frame["language"].unique(maintain_order=True).to_list()
    assert sorted(order) == sorted(example.LANGUAGES) and order == frame["other"][:15].to_list()
    assert abs(order.index("es") - order.index("pt-BR")) == 1 == abs(order.index("ru") - order.index("bg"))
    cell = frame.filter(language="es", other="pt-BR")
    assert cell.select("value", "units", "expected", "label", "other_label").row(0) == (
        60 / 90, 60, "same branch", "Spanish (es), Romance, Latin", "Portuguese (pt-BR), Romance, Latin",
    )  # fmt: skip
    assert frame.filter(language="es", other="es")["value"].item() is None
    assert frame.filter(language="fi", other="tr")["expected"].item() == "same script"
    assert frame.filter(language="he", other="ta")["expected"].item() == "neither"
    assert similarity.table(frame, inputs()).rows[0][:3] == ["pt-BR", "es", "0.667"]
    assert means_by_relation(frame.select("value", relation="expected"))["neither"] == pytest.approx(0.05)
    unknown = inputs(params=example.params() | {"languages": ["xx", "en", "de"]})
    assert similarity.similarity(unknown).filter(language="en", other="de")["expected"].item() == "same branch"
    assert similarity.similarity(inputs(params=example.params() | {"languages": ["en", "de"]})).is_empty()
    assert similarity.section(inputs(similarity=None)) is None


def test_relatives() -> None:
    assert relatives("pt-BR") == ("Romance", "Latin") and relatives("sr-Latn") == ("Slavic", "Latin")
    assert relatives("zh-CN") == ("Sinitic", "Han") and relatives("xx") is None
    assert relatives("deu_Latn") == relatives("de") and relatives("cmn_Hant") == relatives("zh")
    assert relatives("not a tag") is None


def test_steering_ranks_the_methods_and_says_the_verdict() -> None:
    table = steering.methods(inputs())
    assert table["method"].to_list() == ["diffmean", "features"] and table["sampled"].to_list() == [0.5, None]
    assert steering.by_language(inputs()).rows() == [("difference of means", "de", 0.8, 0.9, 0.7)]
    assert (
        "steer worse than the difference of means: \u22120.30 (95 % from \u22120.40 to \u22120.20)"
        in steering.verdict(inputs())
    )
    shown = steering.samples(inputs())
    assert len(shown.rows) == 15 * 3 * 3
    assert shown.rows[0] == ["en", "difference of means", "Prompt 0 <b>", "Antwort 0 in en", "en"]
    assert "<b>" not in str(steering.section(inputs()).blocks[0].caption[0])
    assert steering.section(inputs(metrics={})) is None


def test_mean_fvu() -> None:
    assert quality.mean_fvu(inputs()) == pytest.approx(0.23 + 0.015 * 3)
    assert quality.mean_fvu(inputs(metrics={})) is None


def test_a_missing_column_is_named() -> None:
    with pytest.raises(UserError, match="features.parquet: no column unit"):
        inputs(features=example.features().drop("unit"))
    with pytest.raises(UserError, match="by_layer.parquet: no column hookpoint"):
        inputs(by_layer=example.nll())


def test_bits_per_byte_are_nats_per_token_over_the_bytes(tmp_path: Path) -> None:
    given_ = dataclasses.replace(two_languages(small([("a", "a", 0.5), ("b", "b", 0.5)])), bytes_per_token={"a": 4.0})
    assert own.own_and_others(given_)["bits"].to_list() == [None, pytest.approx(0.5 / math.log(2) / 4)]
    panels = specs_of(page.build(given_))["own"]["vconcat"][0]["hconcat"]
    assert len(panels) == 2 and panels[1]["encoding"]["x"]["field"] == "bits"
    texts = pl.DataFrame({"text_id": ["1", "2", "3", "4"], "language": ["a", "a", "b", "a"],
                          "text": ["äb", "abc", "x", "long"], "split": ["eval", "eval", "eval", "train"]})  # fmt: skip
    rows = pl.DataFrame({"text_id": ["1"] * 2 + ["2"] * 1 + ["3"] * 5 + ["4"] * 2})
    paths = Paths(tmp_path)
    for path, table in ((paths.texts, texts), (paths.tokens, rows[:3]), (paths.extended_tokens, rows[3:])):
        write_atomically(path, table.write_parquet)
    # b's only text has 5 tokens, as many as texts are cut at.
    assert run.bytes_per_token(paths, 5) == {"a": 6 / 3}


def test_headings_state_what_the_figures_are(html: str) -> None:
    titles = re.findall(r'<h3 id="(\w+)-title">(.*?)</h3>', html)
    found = dict(titles)
    assert found["features"] == "14 of 15 languages have features of their own; layer 26 has most, 257 of 908"
    assert found["ablation"] == "Removing a language’s features hurts that language most in 14 of 15 cases"
    assert "Turkish loses most" in found["own"] and found["layers"].startswith(
        "Alone, the features of layer 26 matter most"
    )
    assert found["similarity"] == "Spanish and Portuguese share most features: 67\u202f% of theirs"
    assert found["stability"].startswith("Another seed gives 44\u202f% of the features one by one, but their subspace "
                                         "beyond chance in 14 of 15 languages")  # fmt: skip
    assert [part.split(":")[0] for part in re.findall(r'<h2 class="part">(.*?)</h2>', html)] == [
        "The question", "The evidence", "The doubt", "For reference",
    ]  # fmt: skip


def test_cells_open_the_browser_on_their_features() -> None:
    frame = features.counts(inputs())
    link = frame.filter(language="tr", hookpoint="layers.26.mlp")["href"].item()
    assert link == "features.html#language=tr&hookpoint=layers.26.mlp"
    assert browser_link("a&b=c") == "features.html#language=a%26b%3Dc"
    assert ablation.matrix(inputs())["href"].unique().to_list().count("features.html#language=tr") == 1


def test_the_facts_about_a_language_and_a_hookpoint() -> None:
    facts = about.about(inputs())
    tr = dict(facts["tr"])
    row = example.nll().filter(ablated="tr", evaluated="tr").row(0, named=True)
    assert tr["ΔNLL of itself without them, nats/token"].startswith(significant(row["delta"], sign=True) + " (95 % ")
    assert tr["of its features match one by one in another seed"] == "50.0\u202f%"
    assert dict(facts["ru"])["held-out texts identified as another language"] == "Bulgarian (2)"
    at = dict(facts["layers.26.mlp"])
    assert (
        at["FVU (fraction of variance unexplained)"] == "0.305"
        and at["languages that lose most themselves"] == "14 of 15"
    )
    assert about.cells(inputs())["tr"]["layers.26.mlp"].count("95 %") == 1
    bare = inputs(metrics={}, by_layer=None, control=None, confusion=None, similarity=None)
    assert "layers.26.mlp" in about.about(bare) and about.cells(bare) == {}


def test_the_example_agrees_with_its_own_metrics() -> None:
    matrix = ablation.matrix(inputs())
    own = matrix.filter(pl.col("own"))
    assert own["value"].mean() == pytest.approx(example.metrics()["ablate"]["own"])
    assert own["largest"].sum() == example.metrics()["ablate"]["rows"]


# --- page


def test_headline_figures(html: str) -> None:
    title = re.search(r"<h1>(.*?)</h1>", html)
    assert title is not None and title.group(1).startswith("908 language-specific features: without its own")
    figures = dict(re.findall(r"<div><dt>(.*?)</dt><dd>(.*?)</dd></div>", html))
    assert figures["languages, 14 with features"] == "15"
    assert figures["hookpoints, with one SAE each"] == "7"
    assert figures["mean FVU (fraction of variance unexplained)"] == "0.275"
    assert figures["ΔNLL of the language itself, nats/token"] == significant(
        example.metrics()["ablate"]["own"], sign=True
    )
    assert figures["mean absolute ΔNLL of other languages, nats/token; with its sign: +0.00054"] == "0.0017"


def test_same_inputs_same_page(html: str) -> None:
    assert page.build(inputs()) == html
    shuffled = inputs(features=example.features().sample(fraction=1.0, shuffle=True, seed=1),
                      nll=example.nll().sample(fraction=1.0, shuffle=True, seed=1))  # fmt: skip
    assert page.build(shuffled) == html


def test_page_is_one_small_file_that_names_no_other(html: str) -> None:
    assert len(html.encode()) < 10_000_000
    for tag, attributes in Page(html).tags:
        assert not {"src", "srcset"} & set(attributes), tag
        assert (attributes.get("href") or "#").startswith(("#", "features.html")), tag
        assert tag not in ("link", "iframe", "img", "object", "embed")
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL)
    assert style is not None and "url(" not in style.group(1) and "@import" not in style.group(1)
    assert str(ROOT) not in html


def test_headings_landmarks_and_anchors(html: str) -> None:
    parsed = Page(html)
    assert [parsed.count(tag) for tag in ("h1", "main", "header", "nav", "footer")] == [1] * 5
    ids = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in parsed.tags:
        for key in ("href", "aria-labelledby"):
            if not (attributes.get(key) or "features.html").startswith("features.html"):
                assert str(attributes[key]).removeprefix("#") in ids
    charts_ = {attributes["data-chart"] for _, attributes in parsed.tags if "data-chart" in attributes}
    specs = specs_of(html)
    assert (
        charts_
        == set(specs)
        == {"features", "ablation", "own", "control", "curve", "layers", "similarity", "confusion", "steering", "fvu",
            "stability", "sharing", "switching", "script", "baselines"}
    )  # fmt: skip
    assert all(spec["description"] for spec in specs.values())


def test_every_module_of_a_section_is_on_the_page() -> None:
    files = {path.stem for path in (ROOT / "src/babelscope/report/sections").glob("*.py")}
    assert files - {"__init__"} == set(page.NAMES) and len(set(page.NAMES)) == len(page.NAMES)


def test_every_row_of_a_table_is_as_long_as_its_head() -> None:
    sections = [module.section(inputs()) for module in page.SECTIONS]
    blocks = [block for section in sections if section for block in section.blocks]
    blocks += [part for block in blocks if isinstance(block, Picture) for part in block.caption]
    tables = [block for block in blocks if isinstance(block, Table)]
    assert len({table.caption for table in tables}) == len(tables) == 28
    for table in tables:
        assert table.rows and {len(row) for row in table.rows} == {len(table.head)}, table.caption


def test_languages_that_are_not_identified_are_named() -> None:
    whole = inputs()
    assert "Both leave out" not in page.build(whole)
    assert whole.confusion is not None
    confusion = whole.confusion.filter(~pl.col("language").is_in(["ja", "fi"]))
    metrics = whole.metrics["identify"] | {"all_languages/accuracy/sae-count/units": 0.9, "all_languages/texts": 500}
    some = dataclasses.replace(whole, confusion=confusion, metrics=whole.metrics | {"identify": metrics})
    assert "<p>Both leave out texts in ja, fi: fastText" in page.build(some)
    rows = identification.methods_table(some).rows
    assert [row[:3] for row in rows if "among all languages" in row[0]] == [
        ["sae-count, relative to the number of features, among all languages", "500", "90.0\u202f%"]
    ]


def test_features_found_again_stand_beside_other_latents() -> None:
    table = quality.table(inputs())
    cells = [row[table.head.index("found again")].replace("\u202f", " ") for row in table.rows]
    assert cells == ["–"] * 6 + ["62.5 % (50.0 %)"]


def test_top_features_are_the_first_by_rank_and_none_is_said() -> None:
    rows = features.top_features(inputs()).rows
    assert [row[3] for row in rows if row[0] == "tr"] == [str(rank) for rank in range(1, 11)]
    assert [row[:2] for row in rows if row[0] == "ta"] == [["ta", "no feature"]]


def test_nothing_from_the_inputs_is_run_as_html() -> None:
    params = example.params()
    params["model"]["name"] = SCRIPT
    params["languages"] = [SCRIPT, *params["languages"]]
    nll = pl.concat([example.nll(), small([(SCRIPT, SCRIPT, 0.2)])], how="diagonal_relaxed")
    metrics = example.metrics() | {SCRIPT: {SCRIPT: SCRIPT}}
    html = page.build(
        inputs(params=params, nll=nll, metrics=metrics, files={SCRIPT: SCRIPT}, versions={SCRIPT: SCRIPT})
    )
    assert SCRIPT not in html
    assert "&lt;script&gt;alert(" in html
    assert Page(html).count("script") == 3
    assert any(row["ablated"] == SCRIPT for row in _rows(specs_of(html)["ablation"]))


def _rows(spec: Any) -> list[dict[str, Any]]:
    """The rows of the first data set anywhere in a specification."""
    if isinstance(spec, dict) and isinstance(spec.get("values"), list):
        return list(spec["values"])
    inside = spec.values() if isinstance(spec, dict) else spec if isinstance(spec, list) else []
    return next((rows for one in inside if (rows := _rows(one))), [])


def test_params_are_shown_as_yaml_that_reads_back(html: str) -> None:
    text = re.search(r'<pre id="params"[^>]*>(.*?)</pre>', html, re.DOTALL)
    assert text is not None
    assert YAML(typ="safe", pure=True).load(text.group(1)) == example.params()


def test_features_of_a_language_and_of_its_script() -> None:
    frame = script.by_language(inputs())
    assert frame["language"].to_list() == ["en", "ja", "he"]  # in the order of params.yaml
    of = frame.rows_by_key("language", named=True, unique=True)
    assert of["en"]["bound"] is None and of["he"]["bound"] == 0
    assert of["ja"]["bound"] == (of["ja"]["features"] + 1) // 2
    rows = {row[0]: row for row in script.table(frame).rows}
    assert rows["en"][5] == NONE and rows["he"][5] == "0" and rows["ja"][-2:] == ["+0.700", "+0.200"]
    assert (
        script.section(inputs(script=None)) is None and script.section(inputs(script=example.script().clear())) is None
    )
    table = features.top_features(inputs())
    column = table.head.index("script-bound")
    assert {row[column] for row in table.rows if row[0] == "he"} == {"no"}
    assert {row[column] for row in table.rows if row[0] in ("en", "fr")} == {NONE}
    assert {row[column] for row in table.rows if row[0] == "ja"} == {"yes", "no"}


def test_what_training_the_dictionary_buys() -> None:
    whole = inputs()
    assert whole.baselines is not None
    rows = baselines.everywhere(whole.baselines)
    assert rows["name"].to_list() == ["SAE features", "linear probe"]
    table = baselines.table(whole, rows)
    first, probe = table.rows
    assert first[3] == NONE and probe[3] == "+2.0 (+1.0 to +3.0)"
    assert table.head[4] == "ru/bg" and probe[4] == percent(0.97)
    assert probe[5:] == ["+0.100 to +0.300", NONE, "0.800", percent(0.9), NONE]
    domains = baselines.domains_table(whole.baselines)
    assert domains.head[1:] == [
        "all, tested on one", "all, tested on two", "one, tested on one", "one, tested on two", "two, tested on one",
        "two, tested on two",
    ]  # fmt: skip
    assert baselines.transfer_table(whole).rows == [["one", "two", "40", percent(0.75), percent(0.9)]]
    alone = whole.baselines.filter(trained_on="all", evaluated_on="all")  # a corpus of one domain
    section = baselines.section(inputs(baselines=alone))
    assert section is not None and len(section.blocks) == 2
    assert baselines.section(inputs(baselines=None)) is None


def test_missing_metrics_are_dashes() -> None:
    html = page.build(
        inputs(metrics={}, by_layer=None, control=None, curve=None, confusion=None, generations=None, similarity=None,
               baselines=None, script=None, sharing=None, switching=None, switch_positions=None)
    )  # fmt: skip
    assert set(specs_of(html)) == {"features", "ablation", "own"}
    assert html.count('<span class="status">not measured</span>') == 5
    assert 'id="layers"' not in html and "<dt>ΔNLL of the language itself, nats/token</dt><dd>–</dd>" in html


def test_figures_that_are_no_numbers_do_not_break_the_page() -> None:
    broken = example.nll().with_columns(
        delta=pl.when(evaluated="en").then(float("nan")).when(evaluated="de").then(float("inf")).otherwise("delta")
    )
    specs = specs_of(page.build(inputs(nll=broken)))  # json.loads would take NaN, but not as null
    assert {row["value"] for row in _rows(specs["ablation"]) if row["evaluated"] in ("en", "de")} == {None}


def test_the_control_is_drawn_only_where_there_is_one(html: str) -> None:
    assert "random:Q" not in json.dumps(specs_of(html)["own"])
    with_control = specs_of(page.build(inputs(nll=example.nll(controls=2))))["own"]
    assert len(with_control["vconcat"][0]["layer"]) == len(specs_of(html)["own"]["vconcat"][0]["layer"]) + 2
    assert [row["random"] for row in _rows(with_control)][0] == pytest.approx(0.002)


def test_the_page_says_how_many_languages_are_above_the_control(html: str) -> None:
    assert "own features cost it more than random latents in" not in html
    metrics = example.metrics()
    metrics["ablate"] |= {"languages_above_control": 6, "languages_selective": 0}
    metrics["ablate"] |= {"languages_above_control_holm": 5, "languages_selective_holm": 0}
    text = " ".join(page.build(inputs(metrics=metrics)).split())
    count = len(inputs().languages)
    assert f"cost it more than random latents in 6 of {count} languages" in text
    assert f"more selective than that of random latents in 0 of {count}." in text
    assert f"the two numbers are 5 of {count} and 0 of {count}." in text


def test_divergences_and_controls_of_the_script_are_shown_if_they_were_measured(html: str) -> None:
    assert "divergence of itself" not in html and "latents of the script" not in html
    metrics = example.metrics()
    metrics["ablate"] |= {"kl_own": 0.512, "kl_others": 0.0123, "kl_own/de": 0.51234, "kl_others/de": 0.01234}
    metrics["ablate"] |= {"control_rate/de": 0.98, "dnll_control_script/de": -0.0123, "control_script_rate/de": 0.456}
    metrics["ablate"] |= {"languages_with_script": 13, "languages_above_script": 12, "languages_above_script_holm": 11}
    given = inputs(metrics=metrics, control=example.control())
    text = " ".join(page.build(given).split())
    assert "diverges by 0.512 nats/token for the language itself and by 0.012 for the others" in text
    assert "Of the 13 languages that share their script, the own features cost 12 more" in text and "(11 after" in text
    head, rows = ((table := own.table(given)).head, {row[0]: row for row in table.rows})
    assert head[-2:] == ["divergence of itself", "divergence of others"]
    assert rows["de"][-2:] == ["0.51234", "0.01234"] and rows["fi"][-2:] == ["–", "–"]
    [table] = [part for part in control.section(given).blocks if isinstance(part, Table)]
    assert next(row for row in table.rows if row[0] == "de")[-3:] == ["0.98", "−0.0123", "0.46"]


def test_the_page_says_which_limit_of_entropy_there_is(html: str) -> None:
    assert "effective languages are counted" not in html
    params = example.params()
    params["score"]["max_entropy"] = 0.6931
    text = " ".join(page.build(inputs(params=params)).split())
    assert "belong to exactly one language and have at most 2.00 effective languages are counted" in text


def test_shared_features_are_called_shared() -> None:
    params = example.params()
    params["score"]["members"] = 2
    html = page.build(inputs(params=params))
    assert "908 features shared by exactly 2 languages: without" in html and "language-specific features" not in html


def test_cells_can_be_read_in_both_themes() -> None:
    """The least contrast of black or white on any colour is 4.58 (WCAG), if the better one is taken; texts need 4.5."""
    for colours in (charts._LIGHT, charts._DARK):
        for text in ("text", "muted"):
            assert contrast(colours[text], colours["page"]) >= 4.5
            assert contrast(colours[text], colours["diverging"][3]) >= 4.5
        for bar in ("mark", "second"):
            assert contrast(colours[bar], colours["page"]) >= 3
        lightness = [luminance(colour) for colour in colours["ramp"]]
        assert lightness == sorted(lightness) or lightness == sorted(lightness, reverse=True)


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(first: str, second: str) -> float:
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


# --- stage


def write(folder: Path) -> None:
    example.write(folder)
    browse_example.write(folder)


def run_stage(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "stages/report.py")], cwd=folder, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )  # fmt: skip


def digests(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted((folder / "reports").rglob("*.*"))
    }


def params_file(folder: Path) -> None:
    """The shipped params.yaml, with the languages and hookpoints of the example and other hardware."""
    yaml = YAML()
    content = yaml.load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    content |= {"languages": example.LANGUAGES, "hookpoints": example.HOOKPOINTS}
    content["model"] |= {"source": "huggingface", "name": f"{folder}/models/tiny", "gguf_file": None}
    content["stability"]["hookpoints"] = content["steer"]["hookpoints"] = example.HOOKPOINTS[-1:]
    content["identify"]["also"] = f"{folder}/other-domain"
    with (folder / "params.yaml").open("w", encoding="utf-8") as handle:
        yaml.dump(content, handle)


def test_stage_writes_the_same_bytes_in_any_folder_and_on_any_hardware(tmp_path: Path) -> None:
    first, second = tmp_path / "one", tmp_path / "another"
    write(first)
    params_file(first)
    assert (done := run_stage(first)).returncode == 0, done.stderr
    shutil.copytree(first, second, ignore=shutil.ignore_patterns("reports"))
    text = (second / "params.yaml").read_text(encoding="utf-8").replace("threads: 0", "threads: 1")
    text = text.replace(str(first), str(second))  # which is where model and texts lie
    (second / "params.yaml").write_text("# another comment\n" + text, encoding="utf-8")
    assert run_stage(second).returncode == 0
    assert digests(first) == digests(second)
    assert set(digests(first)) == {
        "ablation.csv", "ablation.png", "features.html", "features_by_layer.csv", "features_by_layer.png",
        "report.html", "training.csv",
    }  # fmt: skip
    summary = json.loads((first / "metrics/summary.json").read_text())
    assert {"dnll_own", "fvu"} <= summary.keys()
    assert summary == json.loads((second / "metrics/summary.json").read_text())
    curves = pl.read_csv(first / "reports/plots/training.csv")
    assert curves["hookpoint"].unique(maintain_order=True).to_list() == example.HOOKPOINTS and len(curves) == 14
    cells = pl.read_csv(first / "reports/plots/ablation.csv")
    assert len(cells) == 15 * 15 and cells["delta"].is_not_null().all()
    html = (first / "reports/report.html").read_text(encoding="utf-8")
    assert "language features of tiny<" in html and "also: other-domain" in html and str(first) not in html
    assert hashlib.md5((first / "data/ablation/by_layer.parquet").read_bytes()).hexdigest() in html
    for name in ("ablation.png", "features_by_layer.png"):
        assert (first / "reports" / name).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_stage_names_a_missing_file(tmp_path: Path) -> None:
    write(tmp_path)
    params_file(tmp_path)
    (tmp_path / "metrics/ablate.json").unlink()
    done = run_stage(tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: metrics/ablate.json: no such file")
    assert not (tmp_path / "reports").exists()
