"""Texts from a folder with a parquet, jsonl or txt file per language, or with one table that has a language column."""

import json
from collections.abc import Sequence
from pathlib import Path

import polars as pl

from babelscope.config.values import expanded
from babelscope.core.errors import UserError
from babelscope.core.files import check_parquet
from babelscope.corpus.groups import name_of
from babelscope.corpus.languages import match, normalise, require

_ALL = ("texts.parquet", "texts.jsonl")


def read(path: str, languages: Sequence[str], key: str = "corpus.path") -> pl.DataFrame:
    """Read the texts of `languages` from the folder `path`; `key` is its key in params.yaml.

    The folder holds `<lang>.parquet` or `<lang>.jsonl` (column or key `text`, and optionally `group` or `id`, which
    translations of each other share), `<lang>.txt` (UTF-8, one text per line), or `texts.parquet` / `texts.jsonl` with
    an additional column `language`. The texts of several files of one language are joined.

    Returns
    -------
    `language` (as in `languages`), `group` (None if the file has none), `source` and `text`, in the order of files and
    lines.

    Raises
    ------
    UserError: the folder does not exist, holds no such files or lacks a language, or a file cannot be read.
    """
    folder = expanded(path)
    if not folder.is_dir():
        raise UserError(f"params.yaml: {key}: no folder {path!r}; set it to one with texts")
    paths = sorted(path for path in folder.iterdir() if path.suffix in _READERS and path.is_file())
    if not paths:
        raise UserError(f"params.yaml: {key}: {path!r} holds no <language>.parquet, .jsonl or .txt, "
                        "and no texts.parquet or texts.jsonl")  # fmt: skip
    source = f"files:{folder.resolve().name}"
    tables = [_table(path, language=None) for path in paths if path.name in _ALL]
    single = [path for path in paths if path.name not in _ALL]
    offered = {language for table in tables for language in table["language"].unique()} | {p.stem for p in single}
    require(languages, {source: offered})
    asked = match(languages, offered)
    tables += [_table(path, path.stem) for path in single if normalise(path.stem) in asked]
    spelling = {name: asked[normalise(name)] for name in sorted(offered) if normalise(name) in asked}
    texts = pl.concat(tables).filter(pl.col("language").is_in(list(spelling)))
    language = pl.col("language").replace_strict(spelling, return_dtype=pl.String)
    return texts.select(language, "group", pl.lit(source).alias("source"), "text")


def _table(path: Path, language: str | None) -> pl.DataFrame:
    """Read `language`, `group` and `text` from one file; `language` is that of its name, or None to read a column."""
    frame = _READERS[path.suffix](path)
    needed = ["text"] if language is not None else ["text", "language"]
    for column in needed:
        if frame.schema.get(column) != pl.String:
            have = ", ".join(f"{name} ({kind})" for name, kind in frame.schema.items())
            raise UserError(f"{path}: needs a column {column!r} of strings; it has: {have or 'nothing'}")
    group = next((name for name in ("group", "id") if name in frame.columns), None)
    frame = frame.select(
        pl.col("language") if language is None else pl.lit(language).alias("language"),
        pl.lit(None, dtype=pl.String).alias("group") if group is None else _groups(path, frame[group]),
        "text",
    )
    if frame["language"].null_count():
        raise UserError(f"{path}: {frame['language'].null_count()} of {frame.height} rows have no 'language'")
    return frame.drop_nulls("text")


def _groups(path: Path, column: pl.Series) -> pl.Series:
    try:
        return pl.Series("group", map(name_of, column), dtype=pl.String)
    except TypeError as error:
        raise UserError(
            f"{path}: column {column.name!r} holds {error}; translations of each other share its value"
        ) from None


def _parquet(path: Path) -> pl.DataFrame:
    try:
        check_parquet(path)
        frame = pl.read_parquet(path, glob=False)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable parquet file: {_short(error)}") from None
    return frame.with_columns(pl.col(pl.Categorical, pl.Enum).cast(pl.String))


def _jsonl(path: Path) -> pl.DataFrame:
    rows: list[dict[str, str | None]] = []
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: line {number} is not JSON: {_short(error)}") from None
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise UserError(f"{path}: line {number} is not an object with a string 'text'")
        try:
            group = name_of(row.get("group", row.get("id")))
        except TypeError as error:
            raise UserError(f"{path}: line {number}: 'group' (or 'id') is {error}") from None
        language = row.get("language")
        if language is not None and not isinstance(language, str):
            raise UserError(f"{path}: line {number}: 'language' is not a string")
        values = {"language": language, "group": group, "text": row["text"]}
        rows.append({key: None if value is None else _encodable(value) for key, value in values.items()})
    return pl.DataFrame(rows, schema=dict.fromkeys(("language", "group", "text"), pl.String))


def _txt(path: Path) -> pl.DataFrame:
    return pl.DataFrame({"text": _lines(path)}, schema={"text": pl.String})


_READERS = {".parquet": _parquet, ".jsonl": _jsonl, ".txt": _txt}


def _lines(path: Path) -> list[str]:
    try:
        # Not splitlines(): a form feed or U+2028 inside a text does not end it.
        return path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable UTF-8 text: {_short(error)}") from None


def _encodable(text: str) -> str:
    """Drop lone surrogates, which JSON can hold as escapes but UTF-8 cannot encode."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "ignore")


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
