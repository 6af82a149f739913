"""Data sets in the hub's format, as local folders laid out like each of the ready-made ones."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from closure import ROOT
from ruamel.yaml import YAML

from babelscope import config
from babelscope.config.schema import Dataset
from babelscope.core.errors import UserError
from babelscope.corpus import hub, languages

# How each one calls a language, and what a row of it looks like; where one subset holds all of them, `label` numbers.
LAYOUTS: dict[str, Any] = {
    "flores-plus": ({"de": "deu_Latn", "zh-CN": "zho_Hans", "no": "nob_Latn"}, lambda c, i: {"id": i,
                    "iso_639_3": c[:3], "text": f"{c} sentence {i}"}, ["dev", "devtest"]),
    "xnli": ({"de": "de", "zh-CN": "zh"}, lambda c, i: {"premise": f"{c} premise {i // 3}", "hypothesis":
             f"{c} hypothesis {i}", "label": i % 3}, ["train", "validation", "test"]),
    "paws-x": ({"de": "de", "zh-CN": "zh"}, lambda c, i: {"id": i + 1, "sentence1": f"{c} one {i}", "sentence2":
               f"{c} two {i}", "label": 0}, ["train", "validation", "test"]),
    "wikipedia": ({"de": "20231101.de", "zh-CN": "20231101.zh", "no": "20231101.no"}, lambda c, i: {"id": str(i),
                  "url": "", "title": "t", "text": f"{c} article {i}"}, ["train"]),
    "fineweb-2": ({"de": "deu_Latn", "zh-CN": "cmn_Hani"}, lambda c, i: {"id": "x",
                  "text": f"{c} page {i}"}, ["train"]),
    "tatoeba": ({"de": "en-de", "zh-CN": "en-zh"}, lambda c, i: {"english": f"sentence {i}", "non_english":
                f"{c} sentence {i}"}, ["train"]),
    "clas-bench": ({"de": "de", "zh-CN": "zh", "no": "no"}, lambda c, i: {"id": f"{c}_{i}", "language_code": c,
                   "language": "L", "question_id": i, "question": f"{c} question {i}?"}, ["train"]),
}  # fmt: skip


def write(
    folder: Path, subsets: dict[str, dict[str, list[dict[str, Any]]]], card: str = "license: cc-by-4.0\n"
) -> Path:
    """A data set: rows by subset and split, as parquet files that the card's metadata names."""
    configs = []
    for subset, splits in subsets.items():
        files = []
        for split, rows in splits.items():
            path = folder / subset / f"{split}-00000-of-00001.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pl.DataFrame(rows).write_parquet(path)
            files.append({"split": split, "path": f"{subset}/{split}-*.parquet"})
        configs.append({"config_name": subset, "data_files": files})
    (folder / "README.md").write_text(f"---\n{card}configs: {json.dumps(configs)}\n---\n# A data set\n")
    return folder


def lay_out(folder: Path, name: str, rows: int = 6) -> Path:
    codes, row, splits = LAYOUTS[name]
    return write(folder / name, {c: {s: [row(c, i) for i in range(rows)] for s in splits} for c in codes.values()})


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_ready_made_entry_reads_its_own_layout(tmp_path: Path, name: str) -> None:
    codes, _, splits = LAYOUTS[name]
    folder = lay_out(tmp_path, name)
    texts, [record] = hub.read([Dataset(name=name, path=str(folder))], list(codes))
    assert record == {"path": name, "revision": None, "license": "cc-by-4.0"}
    assert set(texts["language"]) == set(codes) and set(texts["source"]) == {f"huggingface:{name}"}
    known = hub.entry(Dataset(name=name))
    used = [split for split in splits if split in (known.splits or [])]
    assert used == known.splits
    for language, code in codes.items():
        mine = texts.filter(language=language)
        assert len(mine) == 6 * len(used) * len(known.text or [])
        assert mine["text"].str.starts_with(code).all()
    # Translations of each other are one group, in which every language has the texts of one row.
    if known.group is None:
        assert texts["group"].null_count() == len(texts)
    else:
        sizes = texts.group_by("group").agg(pl.col("language").n_unique(), pl.len())
        assert (sizes["language"] == len(codes)).all() and (sizes["len"] == len(codes) * len(known.text or [])).all()


def test_wili_tells_the_language_by_numbered_labels(tmp_path: Path) -> None:
    from datasets import ClassLabel, Features, Value
    from datasets import Dataset as Table

    names = ["deu", "eng", "tam", "zho"]
    folder = tmp_path / "wili"
    folder.mkdir()
    rows = {"sentence": [f"sentence {i}" for i in range(8)], "label": [i % 4 for i in range(8)]}
    features = Features({"sentence": Value("string"), "label": ClassLabel(names=names)})
    Table.from_dict(rows, features=features).to_parquet(folder / "test-00000-of-00001.parquet")
    texts, _ = hub.read([Dataset(name="wili-2018", path=str(folder))], ["ta", "zh-CN"])
    assert texts.select("language", "text").rows() == [
        ("ta", "sentence 2"), ("ta", "sentence 6"), ("zh-CN", "sentence 3"), ("zh-CN", "sentence 7"),
    ]  # fmt: skip


def test_what_an_entry_says_itself_goes_before_what_is_ready_made(tmp_path: Path) -> None:
    folder = lay_out(tmp_path, "xnli")
    section = Dataset(name="xnli", path=str(folder), splits=["test"], text=["premise"], rows=2, revision="abc")
    texts, [record] = hub.read([section], ["de"])
    assert texts["text"].to_list() == ["de premise 0"] * 2 and record["revision"] == "abc"


def test_data_sets_are_put_together_and_a_language_may_be_in_one_of_them_only(tmp_path: Path) -> None:
    sections = [Dataset(name=name, path=str(lay_out(tmp_path, name))) for name in ("paws-x", "flores-plus")]
    texts, records = hub.read(sections, ["de", "no"])
    found = texts.group_by("language", "source").len().sort("language", "source").rows()
    assert found == [("de", "huggingface:flores-plus", 12), ("de", "huggingface:paws-x", 24),
                     ("no", "huggingface:flores-plus", 12)]  # fmt: skip
    assert len(records) == 2
    # Nor do groups of different data sets meet, whose numbers are the same.
    assert texts.group_by("group").agg(pl.col("source").n_unique())["source"].max() == 1


@pytest.mark.parametrize(
    ("changes", "asked", "message"),
    [
        ({}, ["de", "ja"], "languages: xnli has no 'ja'; it offers: de, zh"),
        (
            {"path": "facebook/no-such-data-set"},
            ["de"],
            r"corpus\.datasets: path: cannot read 'facebook/no-such-data-set'",
        ),
        ({"path": "./nowhere"}, ["de"], r"corpus\.datasets: path: no folder './nowhere'"),
        ({"splits": ["dev"]}, ["de"], r"corpus\.datasets: path: cannot read .*dev"),
        ({"text": ["sentence"]}, ["de"], r"has no column 'sentence'; it has: premise, hypothesis, label"),
        ({}, ["de", "de-AT"], "languages: xnli has only 'de' for both 'de' and 'de-AT'; keep one of them"),
        ({"group": "pair"}, ["de"], r"has no column 'pair'"),
    ],
)
def test_what_cannot_be_had_is_named(tmp_path: Path, changes: dict[str, Any], asked: list[str], message: str) -> None:
    section = Dataset(**{"name": "xnli", "path": str(lay_out(tmp_path, "xnli")), **changes})
    with pytest.raises(UserError, match=message):
        hub.read([section], asked)


def test_a_network_that_fails_in_the_middle_of_a_stream_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its errors come from three libraries, and have nothing in common."""

    class Payload(Exception):
        pass

    def broken(*_: Any, **__: Any) -> Iterator[dict[str, Any]]:
        yield {"premise": "a", "hypothesis": "b"}
        raise Payload("connection closed")

    monkeypatch.setattr("datasets.load_dataset", broken)
    section = Dataset(name="xnli", path=str(lay_out(tmp_path, "xnli")))
    with pytest.raises(UserError, match=r"corpus\.datasets: path: cannot read .*: Payload: connection closed"):
        hub.read([section], ["de"])


def parsed(**corpus: Any) -> config.Config:
    content = YAML(typ="safe", pure=True).load((ROOT / "params.yaml").read_text())
    content["corpus"] |= {"source": "huggingface", "packages": [], **corpus}
    return config.parse(content)


@pytest.mark.parametrize(
    ("datasets", "message"),
    [
        ([], r"corpus\.datasets: the source 'huggingface' needs at least one"),
        ([{"name": "xnly"}], r"corpus\.datasets\.0\.name: .*'xnly'"),
        ([{"name": "xnli", "split": "test"}], r"corpus\.datasets\.0\.split: unknown key"),
        ([{"path": "x/y", "splits": ["train"]}], r"corpus\.datasets\.0: text is missing"),
        ([{"path": "x/y", "splits": ["train"], "text": ["t"]}], r"corpus\.datasets\.0: language is missing"),
        ([{"name": "xnli", "rows": 0}], r"corpus\.datasets\.0\.rows"),
    ],
)
def test_wrong_entries_are_named_by_their_key(datasets: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parsed(datasets=datasets)


@pytest.mark.parametrize(
    ("language", "offered", "wanted"),
    [
        ("zh-CN", ["zho_Hant", "zho_Hans", "yue_Hant"], "zho_Hans"),
        ("zh-TW", ["zho_Hant", "zho_Hans"], "zho_Hant"),
        ("zh-CN", ["cmn_Hani", "jpn_Jpan"], "cmn_Hani"),
        ("pt-BR", ["por_Latn", "spa_Latn"], "por_Latn"),
        ("no", ["nob_Latn", "nno_Latn", "dan_Latn"], "nob_Latn"),
        ("he", ["iw"], "iw"),
        ("he", ["heb_Hebr"], "heb_Hebr"),
        ("ta", ["tam"], "tam"),
        ("sr-Latn", ["srp_Cyrl"], None),
        ("hr", ["bos_Latn"], None),
        ("xx", ["de"], None),
        # A region, where the language is offered without one, and the other way round; another region is not taken.
        ("en-GB", ["eng_Latn"], "eng_Latn"),
        ("pt-PT", ["pt_BR", "pt"], "pt"),
        ("pt", ["pt_PT", "pt_BR"], "pt_BR"),
        ("es", ["es-MX"], "es-MX"),
        ("pt-PT", ["pt_BR"], None),
        ("de-CH", ["de_AT"], "de_AT"),
        ("zh-HK", ["cmn_Hans", "cmn_Hant"], "cmn_Hant"),
        ("ca-valencia", ["cat_Latn"], "cat_Latn"),
        # Members of macrolanguages, both ways; not of those that have a standard language.
        ("ps", ["pbt_Arab"], "pbt_Arab"),
        ("quy_Latn", ["qu"], "qu"),
        ("ff", ["fuv_Latn", "fra_Latn"], "fuv_Latn"),
        ("ff", ["fuv_Latn", "fub_Latn"], None),
        ("ms", ["id"], None),
        ("zh", ["yue_Hant"], None),
        ("arz", ["ar"], None),
        ("fa", ["pes_Arab", "prs_Arab"], "pes_Arab"),
        ("prs", ["pes_Arab", "prs_Arab"], "prs_Arab"),
        ("tl", ["tgl_Latn", "fil_Latn"], "fil_Latn"),
        # The only script that there is, of a language that CLDR hardly knows.
        ("crh", ["crh_Latn"], "crh_Latn"),
        ("crh", ["crh_Latn", "crh_Cyrl"], "crh_Latn"),
        ("crh_Latn", ["crh"], "crh"),
        ("ko", ["kor_Hang", "zho_Hans"], "kor_Hang"),
        ("ur", ["urd_Aran"], "urd_Aran"),
        ("hi", ["hin_Latn"], None),
        ("az", ["azb_Arab"], None),
        ("az-Arab", ["azb_Arab", "azj_Latn"], "azb_Arab"),
        ("pa-Arab", ["pan_Guru", "pnb_Arab"], "pnb_Arab"),
        ("sr-Latn", ["sh", "sr"], None),
        ("sh", ["hbs", "hr"], "hbs"),
        # Wikipedia's codes; `als` is Alemannic beside Albanian only.
        ("gsw", ["als", "sq"], "als"),
        ("als", ["als", "sq"], "sq"),
        ("sq", ["als_Latn", "gsw_Latn"], "als_Latn"),
        ("lzh", ["zh", "zh-classical"], "zh-classical"),
        ("nan", ["zh-min-nan"], "zh-min-nan"),
        ("eml", ["eml"], "eml"),
        ("und", ["und-Latn", "mul"], None),
        ("de", ["i-klingon", "x-foo", "i-default", "", "mul", "art-lojban"], None),
        ("de", ["not a tag", "all_languages"], None),
    ],
)
def test_languages_are_told_apart_by_a_library(language: str, offered: list[str], wanted: str | None) -> None:
    assert languages.nearest_tag(language, offered) == wanted


def test_files_named_by_other_codes_match_too() -> None:
    assert languages.match(["de", "zh-CN"], ["deu_Latn", "zh_CN"]) == {
        "deu-latn": "de",
        "zh-cn": "zh-CN",
    }
    # What is there once goes to the one that it fits best, whatever their order.
    assert languages.match(["pt-PT", "pt-BR"], ["pt", "pt_BR"]) == {"pt": "pt-PT", "pt-br": "pt-BR"}
    assert languages.match(["de-AT", "de"], ["de"]) == {"de": "de"}
    with pytest.raises(UserError, match="x and y have only 'nob-Latn' for both 'no' and 'nb'; keep one of them"):
        languages.require(["no", "nb"], {"x": ["nob_Latn"], "y": ["eng_Latn"]})
    assert languages.require(["no", "nb"], {"x": ["nob_Latn"], "y": ["nb"]}) is None


def test_rows_without_a_group_or_a_label_are_not_put_together(tmp_path: Path) -> None:
    from datasets import ClassLabel, Features, Value
    from datasets import Dataset as Table

    folder = tmp_path / "labelled"
    folder.mkdir()
    rows = {"text": ["a", "b", "c"], "id": [None, None, "7"], "label": [0, -1, 1]}
    kinds = {"text": Value("string"), "id": Value("string"), "label": ClassLabel(names=["deu", "fin"])}
    Table.from_dict(rows, features=Features(kinds)).to_parquet(folder / "test-00000-of-00001.parquet")
    section = Dataset(path=str(folder), splits=["test"], text=["text"], language="label", group="id")
    texts, _ = hub.read([section], ["de", "fi"])
    # -1 is no label: not the last language.
    assert texts.select("language", "text").rows() == [("de", "a"), ("fi", "c")]
    assert texts["group"].to_list() == [None, "huggingface:labelled:test:7"]


def one_table(folder: Path, **columns: list[Any]) -> dict[str, Any]:
    """An entry that is spelled out, of one table with a column `language`."""
    folder.mkdir()
    pl.DataFrame(columns, strict=False).write_parquet(folder / "train.parquet")
    return {"path": str(folder), "splits": ["train"], "language": "language", "text": ["text"]}


def test_a_table_sorted_by_language_is_read_to_the_rows_of_each(tmp_path: Path) -> None:
    names = ["de"] * 7 + ["deu"] * 2 + ["en"] * 3 + ["fr"] * 9
    entry = one_table(tmp_path / "t", text=[f"text {i}" for i in range(len(names))], language=names)
    texts, _ = hub.read([Dataset(**entry, rows=4)], ["fr", "de", "en"])
    assert texts.select("language", "text").rows() == [
        *(("fr", f"text {i}") for i in range(12, 16)), *(("de", f"text {i}") for i in range(4)),
        *(("en", f"text {i}") for i in range(9, 12)),
    ]  # fmt: skip


def test_the_columns_of_a_row_are_one_group_whether_it_names_one_or_not(tmp_path: Path) -> None:
    entry = one_table(tmp_path / "t", text=["a", "b", "c", "d"], other=["a2", "b2", None, "d2"],
                      language=["de", "en", "de", "en"], pair=[1.0, 1.0, None, float("nan")])  # fmt: skip
    texts, _ = hub.read([Dataset(**entry | {"text": ["text", "other"], "group": "pair"})], ["de", "en"])
    groups = texts.group_by("group").agg(pl.col("text").sort()).sort("text")["text"].to_list()
    assert groups == [["a", "a2", "b", "b2"], ["c"], ["d", "d2"]]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": [["a"], ["b"]]}, "text: column 'text' of .* holds list instead of strings"),
        ({"text": [{"a": "x"}, {"a": "y"}]}, "text: column 'text' of .* holds dict instead of strings"),
        ({"language": [1, 2]}, "language: column 'language' of .* holds int instead of strings"),
        ({"pair": [[1], [2]]}, "group: column 'pair' of .* holds list instead of a string or a number"),
        ({"pair": [b"a", b"b"]}, "group: column 'pair' of .* holds bytes instead of a string or a number"),
    ],
)
def test_columns_of_other_kinds_are_named(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    rows = {"text": ["a", "b"], "language": ["de", "en"], "pair": [1, 2]} | columns
    with pytest.raises(UserError, match=message):
        hub.read([Dataset(**one_table(tmp_path / "t", **rows), group="pair")], ["de", "en"])
