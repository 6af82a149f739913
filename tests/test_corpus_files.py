import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from babelscope.core.errors import UserError
from babelscope.corpus import text_files


def read(folder: Path, *languages: str) -> pl.DataFrame:
    return text_files.read(str(folder), languages)


def write_jsonl(path: Path, *rows: object) -> None:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")


def test_one_file_per_language_in_any_of_the_formats(tmp_path: Path) -> None:
    pl.DataFrame({"id": [7, 8], "text": ["sieben", None], "more": [1, 2]}).write_parquet(tmp_path / "de.parquet")
    write_jsonl(tmp_path / "zh_CN.jsonl", {"text": "七", "id": 7}, {"text": "九", "group": "g9"})
    (tmp_path / "no.txt").write_bytes("\ufeffsju\r\nni\n".encode())
    (tmp_path / "README.md").write_text("not a text")
    frame = read(tmp_path, "zh-CN", "no", "de")
    assert frame.columns == ["language", "group", "source", "text"]
    rows = {(row["language"], row["group"], row["text"].strip()) for row in frame.to_dicts() if row["text"]}
    assert rows == {
        ("de", "7", "sieben"),
        ("zh-CN", "7", "七"),
        ("zh-CN", "g9", "九"),
        ("no", None, "sju"),
        ("no", None, "ni"),
    }
    assert frame["source"].unique().to_list() == [f"files:{tmp_path.name}"]


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_one_table_for_all_languages(tmp_path: Path, kind: str) -> None:
    table = pl.DataFrame(
        {"language": ["he", "pt-br", "fr"], "text": ["שלום", "olá", "salut"], "group": ["a", "a", "a"]}
    )
    if kind == "parquet":
        table.with_columns(pl.col("language").cast(pl.Categorical)).write_parquet(tmp_path / "texts.parquet")
    else:
        table.write_ndjson(tmp_path / "texts.jsonl")
    assert read(tmp_path, "pt-BR", "he").sort("language").select("language", "group", "text").rows() == [
        ("he", "a", "שלום"),
        ("pt-BR", "a", "olá"),
    ]
    with pytest.raises(UserError, match=r"has no 'it'; it offers: fr, he, pt-br"):
        read(tmp_path, "it", "he")


def test_a_group_is_the_same_in_every_spelling_of_a_number(tmp_path: Path) -> None:
    pl.DataFrame({"text": list("abc"), "id": [1, 2, 3]}).write_parquet(tmp_path / "de.parquet")
    gaps = pl.Series([1.0, None, float("nan"), 2.5])  # integers with gaps, as pandas stores them
    pl.DataFrame({"text": list("defg"), "id": gaps}).write_parquet(tmp_path / "en.parquet")
    lines = [
        '{"text": "h", "id": 1.0}',
        '{"text": "i", "id": "1"}',
        '{"text": "j", "id": NaN}',
        '{"text": "k", "id": ""}',
    ]
    (tmp_path / "fr.jsonl").write_text("\n".join(lines))
    pl.DataFrame({"text": list("lm"), "id": [Decimal("1.00"), None]}).write_parquet(tmp_path / "it.parquet")
    groups = dict(read(tmp_path, "de", "en", "fr", "it").select("text", "group").iter_rows())
    assert {text for text, group in groups.items() if group == "1"} == set("adhil")
    assert {text for text, group in groups.items() if group is None} == set("efjkm")
    assert (groups["b"], groups["g"]) == ("2", "2.5")


@pytest.mark.parametrize("value", [[1, 2], b"x", {"a": 1}])
def test_a_group_of_another_kind_is_an_error(tmp_path: Path, value: Any) -> None:
    pl.DataFrame({"text": ["a"], "group": [value]}).write_parquet(tmp_path / "de.parquet")
    with pytest.raises(UserError, match=r"de\.parquet: column 'group' holds \w+ instead of a string or a number"):
        read(tmp_path, "de")
    if not isinstance(value, bytes):
        write_jsonl(tmp_path / "fr.jsonl", {"text": "a", "id": value})
        with pytest.raises(UserError, match=r"fr\.jsonl: line 1: 'group' \(or 'id'\) is \w+ instead of a string"):
            read(tmp_path, "fr")


def test_lone_surrogates_of_json_are_dropped(tmp_path: Path) -> None:
    (tmp_path / "en.jsonl").write_text('{"text": "a\\ud800b \\ud83d\\ude00"}')
    assert read(tmp_path, "en")["text"].to_list() == ["ab 😀"]


def test_missing_places_and_languages(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"corpus\.path: no folder"):
        read(tmp_path / "nowhere", "en")
    with pytest.raises(UserError, match=r"holds no <language>\.parquet"):
        read(tmp_path, "en")
    (tmp_path / "en.txt").write_text("hello")
    with pytest.raises(UserError, match="has no 'de'; it offers: en"):
        read(tmp_path, "de")


def test_damaged_files_are_named(tmp_path: Path) -> None:
    good = tmp_path / "good.parquet"
    pl.DataFrame({"text": ["one text"] * 500}).write_parquet(good)
    whole = good.read_bytes()
    for damaged in (b"", b"PAR1", whole[:-20], whole[: len(whole) // 2], b"PAR1" + b"\xff" * 200 + whole[-8:]):
        (tmp_path / "de.parquet").write_bytes(damaged)
        with pytest.raises(UserError, match=r"de\.parquet: not a readable parquet file"):
            read(tmp_path, "de")
    pl.DataFrame({"sentence": ["x"]}).write_parquet(tmp_path / "fr.parquet")
    with pytest.raises(UserError, match=r"fr\.parquet: needs a column 'text' of strings; it has: sentence \(String\)"):
        read(tmp_path, "fr")
    (tmp_path / "ru.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"ru\.txt: not readable UTF-8"):
        read(tmp_path, "ru")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "ok"}\n{"text": ', "line 2 is not JSON"),
        ('\n["text"]', "line 2 is not an object with a string 'text'"),
        ('{"text": 5}', "line 1 is not an object with a string 'text'"),
        ("[" * 200_000, "line 1 is not JSON"),
    ],
)
def test_damaged_json_lines_are_numbered(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "es.jsonl").write_text(content)
    with pytest.raises(UserError, match=rf"es\.jsonl: {message}"):
        read(tmp_path, "es")


def test_a_table_row_without_a_language_is_an_error(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "texts.jsonl", {"text": "a", "language": "en"}, {"text": "b"})
    with pytest.raises(UserError, match=r"texts\.jsonl: 1 of 2 rows have no 'language'"):
        read(tmp_path, "en")
