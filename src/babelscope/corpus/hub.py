"""Texts from data sets in the Hugging Face hub's format, streamed: hub ids, or local folders with the same layout.

The predefined entries follow each data set's card: the subset of a language, the columns with texts, and the column
that translations of each other share. `languages.nearest_tag` matches the codes of languages.
"""

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import polars as pl

from babelscope.config.schema import Dataset
from babelscope.config.values import expanded
from babelscope.core.errors import UserError
from babelscope.corpus.groups import name_of
from babelscope.corpus.languages import match, nearest_tag, normalise, require

log = logging.getLogger(__name__)

# Rows read per language and split if `rows` is not set.
ROWS = 5000
# The value of `group` if translations of each other have the same row number in every language.
ROW = "row"
LANGUAGE = "{language}"

_SCHEMA = {"language": pl.String, "group": pl.String, "source": pl.String, "text": pl.String}
_Text = tuple[str, str | None, str, str]  # a row of this schema
_ENTRIES: dict[str, dict[str, Any]] = {
    # Both splits hold the same sentences in every language. The terms must be accepted on the hub first.
    "flores-plus": {
        "path": "openlanguagedata/flores_plus", "subset": LANGUAGE, "splits": ["dev", "devtest"], "text": ["text"],
        "group": "id",
    },
    # Only these splits are translated by people.
    "xnli": {
        "path": "facebook/xnli", "subset": LANGUAGE, "splits": ["validation", "test"],
        "text": ["premise", "hypothesis"], "group": ROW,
    },
    "paws-x": {
        "path": "google-research-datasets/paws-x", "subset": LANGUAGE, "splits": ["validation", "test"],
        "text": ["sentence1", "sentence2"], "group": "id",
    },
    "wili-2018": {"path": "MartinThoma/wili_2018", "splits": ["test"], "text": ["sentence"], "language": "label"},
    "wikipedia": {
        "path": "wikimedia/wikipedia", "subset": f"20231101.{LANGUAGE}", "splits": ["train"], "text": ["text"],
    },
    "fineweb-2": {"path": "HuggingFaceFW/fineweb-2", "subset": LANGUAGE, "splits": ["train"], "text": ["text"]},
    # Pairs with English; a sentence's group is its English translation.
    "tatoeba": {
        "path": "sentence-transformers/parallel-sentences-tatoeba", "subset": f"en-{LANGUAGE}", "splits": ["train"],
        "text": ["non_english"], "group": "english",
    },
    # 70 open questions in 32 languages (arXiv 2601.08331): prompts, too short to compare languages on.
    "clas-bench": {
        "path": "DGurgurov/CLaS-Bench", "subset": LANGUAGE, "splits": ["train"], "text": ["question"],
        "group": "question_id",
    },
}  # fmt: skip


def entry(section: Dataset) -> Dataset:
    """The predefined entry that `section` names, with the values that `section` sets; without one, `section` itself."""
    return Dataset.model_validate(_ENTRIES.get(section.name or "", {}) | section.model_dump(exclude_none=True))


def read(
    sections: Sequence[Dataset],
    languages: Sequence[str],
    key: str = "corpus.datasets",
    advance: Callable[[int], None] = lambda rows: None,
) -> tuple[pl.DataFrame, list[dict[str, str | None]]]:
    """Read the texts of `languages` from data sets: the first `rows` rows of every language in each split.

    Parameters
    ----------
    sections: the data sets, in the order of the result.
    languages: BCP-47 tags; at least one data set must have each of them.
    key: the key of the data sets in params.yaml, for messages.
    advance: called with the number of rows read since the last call.

    Returns
    -------
    A frame with `language` (as in `languages`), `group` (None for data sets without one), `source` and `text`; and a
    record per data set with `path` (the name of a local folder), `revision` and `license` (from its card, or None).

    Raises
    ------
    UserError: a data set cannot be read or lacks a column or split, or no data set has one of the languages.
    """
    rows: list[_Text] = []
    records: list[dict[str, str | None]] = []
    offered: dict[str, list[str]] = {}
    for number, section in enumerate(sections):
        prefix = f"params.yaml: {key}" + (f".{number}" if len(sections) > 1 else "")
        found = _DataSet(entry(section), prefix)
        if found.section.revision is None and not found.is_local:
            log.warning("%s: %s is not pinned; set its revision to a commit hash", prefix, found.section.path)
        first = len(rows)
        for row in found.rows(languages):
            rows.append(row)
            if len(rows) % 1000 == 0:
                advance(1000)
        offered[f"{found.name} ({number})" if found.name in offered else found.name] = found.codes
        missing = [name for name in languages if name not in {row[0] for row in rows[first:]}]
        if missing and len(sections) > 1:
            log.warning("%s has no texts in %s", found.name, ", ".join(missing))
        records.append({"path": found.name, "revision": found.section.revision, "license": found.license()})
    require(languages, offered)
    return pl.DataFrame(rows, schema=_SCHEMA, orient="row"), records


class _DataSet:
    """One data set: its languages and its rows."""

    def __init__(self, section: Dataset, prefix: str) -> None:
        self.section, self.prefix = section, prefix
        self.codes: list[str] = []  # all languages of the data set, known once `rows` has run
        folder = expanded(str(section.path))
        self.is_local = folder.is_dir()
        if str(section.path).startswith((".", "/", "~")) and not self.is_local:
            raise UserError(f"{prefix}: path: no folder {section.path!r}")
        self.path = str(folder) if self.is_local else str(section.path)
        # The name in outputs: only the last part of a local path, since the rest differs between machines.
        self.name = folder.resolve().name if self.is_local else self.path

    def _call(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Call a function of `datasets`, and turn its many types of errors into one that names the data set."""
        try:
            return function(*arguments, **options)
        except UnpicklingError:
            reason = "it holds pickled code, which is never run"
        except MemoryError:
            raise
        except Exception as error:  # errors of file formats and of three network libraries
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(f"{self.prefix}: path: cannot read {self.section.path!r}: {reason}") from None

    def _refusal(self, key: str, column: str | None, held: object) -> UserError:
        return UserError(f"{self.prefix}: {key}: column {column!r} of {self.section.path!r} holds {held}")

    def rows(self, languages: Sequence[str]) -> Iterator[_Text]:
        """Yield the texts in those of `languages` that the data set has; sets `codes`."""
        if self.section.language is not None:
            for split in self.section.splits or []:
                yield from self._of_column(languages, split)
            return
        from datasets import get_dataset_config_names

        subset = str(self.section.subset)
        form = re.compile(re.escape(subset).replace(re.escape(LANGUAGE), "(.+)"))
        names = self._call(get_dataset_config_names, self.path, revision=self.section.revision)
        self.codes = [found[1] for found in map(form.fullmatch, names) if found]
        spelled = {normalise(code): code for code in sorted(self.codes, reverse=True)}
        for tag, name in sorted(match(languages, self.codes).items(), key=lambda pair: languages.index(pair[1])):
            for split in self.section.splits or []:
                stream = self._stream(subset.replace(LANGUAGE, spelled[tag]), split)
                for number, row in enumerate(islice(stream, self.section.rows or ROWS)):
                    yield from self._texts(name, split, number, row)

    def _of_column(self, languages: Sequence[str], split: str) -> Iterator[_Text]:
        """Yield the texts of a split with a language column, read until every language has enough rows."""
        labels, most = self._labels(), self.section.rows or ROWS
        if labels:
            self.codes = sorted(labels)
        kept: dict[str, list[tuple[int, dict[str, Any]]]] = {}
        for number, row in enumerate(self._stream(self.section.subset, split)):
            code = self._code(row[str(self.section.language)], labels)
            if code is None:
                continue
            if code not in kept:
                kept[code] = []
                self.codes = sorted({*self.codes, code})
            # All codes that may fit a language are kept, since only the end shows which one fits best.
            if len(kept[code]) < most and _might_be(code, tuple(languages)):
                kept[code].append((number, row))
                full = len(kept[code]) == most
                if full and [len(kept.get(c, [])) for c in self._wanted(languages)] == [most] * len(languages):
                    break
        for code, name in self._wanted(languages).items():
            for number, row in kept.get(code, []):
                yield from self._texts(name, split, number, row)

    def _wanted(self, languages: Sequence[str]) -> dict[str, str]:
        """Code in the column -> language, for those of `languages` found so far, in their order."""
        given = match(languages, self.codes)
        found = {code: given[normalise(code)] for code in self.codes if normalise(code) in given}
        return dict(sorted(found.items(), key=lambda pair: languages.index(pair[1])))

    def _texts(self, language: str, split: str, number: int, row: Mapping[str, Any]) -> Iterator[_Text]:
        """Yield the texts of one row, which form one group with their translations."""
        source, columns, key = f"huggingface:{self.name}", self.section.text or [], self.section.group
        # A row that names no group is a group of its own.
        group = f"{source}:{split}:{language}:row {number}" if len(columns) > 1 else None
        if key is not None:
            try:
                mark = str(number) if key == ROW else name_of(row[key])
            except TypeError as error:
                raise self._refusal("group", key, error) from None
            group = group if mark is None else f"{source}:{split}:{mark}"
        for column in columns:
            text = row[column]
            if isinstance(text, str):
                yield language, group, source, text
            elif text is not None:
                raise self._refusal("text", column, f"{type(text).__name__} instead of strings")

    def _load(self, subset: str | None, split: str) -> Any:
        from datasets import load_dataset

        options = {"name": subset, "split": split, "revision": self.section.revision, "streaming": True}
        return self._call(load_dataset, self.path, **options)

    def _stream(self, subset: str | None, split: str) -> Iterator[dict[str, Any]]:
        """The rows of a split."""
        group = None if self.section.group == ROW else self.section.group
        needed = [*(self.section.text or []), *filter(None, [self.section.language, group])]
        rows = iter(self._load(subset, split))
        while (row := self._call(next, rows, None)) is not None:
            missing = [name for name in needed if name not in row]
            if missing:
                raise UserError(
                    f"{self.prefix}: {self.section.path!r} has no column {missing[0]!r}; it has: {', '.join(row)}"
                )
            yield row

    def _labels(self) -> list[str]:
        """The names of a numeric language column (a `ClassLabel`) in the order of their numbers, or an empty list."""
        from datasets import Features

        stream = self._load(self.section.subset, (self.section.splits or [""])[0])
        features = stream.features
        if features is None:  # the card does not list them, so they are read from the first file
            rows = iter(stream.with_format("arrow").iter(batch_size=1))
            first = self._call(lambda _path, revision: next(rows, None))
            features = {} if first is None else Features.from_arrow_schema(first.schema)
        return list(getattr(features.get(self.section.language), "names", None) or [])

    def _code(self, value: Any, labels: Sequence[str]) -> str | None:
        """The language that a row's column names, if any."""
        if isinstance(value, str):
            return value
        if isinstance(value, int) and labels:
            return labels[value] if 0 <= value < len(labels) else None  # `datasets` writes -1 for "no label"
        if value is not None:
            raise self._refusal("language", self.section.language, f"{type(value).__name__} instead of strings")
        return None

    def license(self) -> str | None:
        """The licence in the card's metadata, if there is one."""
        from huggingface_hub import DatasetCard

        try:
            card = DatasetCard.load(Path(self.path) / "README.md" if self.is_local else self.path)
        except Exception:  # the card is optional
            return None
        found = card.data.to_dict().get("license")
        return ", ".join(found) if isinstance(found, list) else found


@cache
def _might_be(code: str, languages: tuple[str, ...]) -> bool:
    """Whether a code may be one of the languages, depending on the other codes (with `sq`, `als` is Alemannic)."""
    return any(nearest_tag(name, others) == code for name in languages for others in ([code], [code, "sq"]))
