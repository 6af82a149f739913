"""Texts from data sets in the Hugging Face hub's format: hub ids, or local folders laid out alike; streamed.

The ready-made entries follow each data set's card: which subset holds a language, which columns the texts, and what is
the same in translations of each other. Codes of languages are matched by `languages.nearest_tag`.
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

# Rows read per language and split where `rows` does not say otherwise.
ROWS = 5000
# `group: row`: translations of each other stand in the same row of every language.
ROW = "row"
LANGUAGE = "{language}"

_SCHEMA = {"language": pl.String, "group": pl.String, "source": pl.String, "text": pl.String}
_ENTRIES: dict[str, dict[str, Any]] = {
    # Both of its splits are translations of the same English sentences; its terms are to be accepted on the hub first.
    "flores-plus": {
        "path": "openlanguagedata/flores_plus", "subset": LANGUAGE, "splits": ["dev", "devtest"], "text": ["text"],
        "group": "id",
    },
    # The splits translated by people.
    "xnli": {
        "path": "facebook/xnli", "subset": LANGUAGE, "splits": ["validation", "test"],
        "text": ["premise", "hypothesis"], "group": ROW,
    },
    "paws-x": {
        "path": "google-research-datasets/paws-x", "subset": LANGUAGE, "splits": ["validation", "test"],
        "text": ["sentence1", "sentence2"], "group": "id",
    },
    "wili-2018": {
        "path": "MartinThoma/wili_2018", "splits": ["test"], "text": ["sentence"], "language": "label",
    },
    "wikipedia": {
        "path": "wikimedia/wikipedia", "subset": f"20231101.{LANGUAGE}", "splits": ["train"], "text": ["text"],
    },
    "fineweb-2": {
        "path": "HuggingFaceFW/fineweb-2", "subset": LANGUAGE, "splits": ["train"], "text": ["text"],
    },
    # Pairs with English; a sentence's group is its English translation.
    "tatoeba": {
        "path": "sentence-transformers/parallel-sentences-tatoeba", "subset": f"en-{LANGUAGE}", "splits": ["train"],
        "text": ["non_english"], "group": "english",
    },
}  # fmt: skip


def entry(section: Dataset) -> Dataset:
    """The data set as it is to be read: a ready-made entry with what `section` itself says in place of its own."""
    own = {key: value for key, value in section.model_dump().items() if value is not None}
    return Dataset.model_validate({**_ENTRIES.get(section.name or "", {}), **own})


def read(
    sections: Sequence[Dataset],
    languages: Sequence[str],
    key: str = "corpus.datasets",
    advance: Callable[[int], None] = lambda rows: None,
) -> tuple[pl.DataFrame, list[dict[str, str | None]]]:
    """The texts of `languages` in some data sets: from each split the first `rows` rows of every language.

    Parameters
    ----------
    sections: the data sets, put one behind the other.
    languages: BCP-47 tags. One need not be in every data set, but in one of them.
    key: where params.yaml names the data sets.
    advance: called with the number of rows read so far, since the last call.

    Returns
    -------
    language (as in `languages`), group (of data sets without one: null), source, text; and a record per data set:
    `path` (of a local folder its name), `revision`, `license` (as its card has it, or null).

    Raises
    ------
    UserError: a data set cannot be had, lacks a column or split, or none of them has one of the languages.
    """
    rows: list[tuple[str, str | None, str, str]] = []
    records: list[dict[str, str | None]] = []
    offered: dict[str, list[str]] = {}
    for number, section in enumerate(sections):
        known, place = entry(section), f"params.yaml: {key}.{number}" if len(sections) > 1 else f"params.yaml: {key}"
        if known.revision is None and not expanded(str(known.path)).is_dir():
            log.warning("%s: %s is not pinned; set its revision to a commit hash", place, known.path)
        found = _DataSet(known, place)
        read = len(rows)
        for row in found.rows(languages):
            rows.append(row)
            if len(rows) % 1000 == 0:
                advance(1000)
        offered[f"{found.name} ({number})" if found.name in offered else found.name] = found.codes
        lacks = [name for name in languages if name not in {row[0] for row in rows[read:]}]
        if lacks and len(sections) > 1:
            log.warning("%s has no texts in %s", found.name, ", ".join(lacks))
        records.append({"path": found.name, "revision": known.revision, "license": found.license()})
    require(languages, offered)
    return pl.DataFrame(rows, schema=_SCHEMA, orient="row"), records


class _DataSet:
    """One data set: which languages it has, and its rows."""

    def __init__(self, section: Dataset, place: str) -> None:
        self.section, self.place = section, place
        self.codes: list[str] = []  # of the languages that it offers, once `rows` has run
        folder = expanded(str(section.path))
        self.local = folder.is_dir()
        if str(section.path).startswith((".", "/", "~")) and not self.local:
            raise UserError(f"{place}: path: no folder {section.path!r}")
        self.path = str(folder) if self.local else str(section.path)
        # What outputs call it: of a local folder the last part only, for the rest is of this machine.
        self.name = folder.resolve().name if self.local else self.path

    def _call(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Call a function of `datasets`; its many errors become one that names the data set."""
        try:
            return function(self.path, *arguments, revision=self.section.revision, **options)
        except UnpicklingError:
            what = "it holds pickled code, which is never run"
            raise UserError(f"{self.place}: path: cannot read {self.section.path!r}: {what}") from None
        except MemoryError:
            raise
        except Exception as error:  # of its file formats, and of three libraries for the network
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise UserError(f"{self.place}: path: cannot read {self.section.path!r}: {reason}") from None

    def rows(self, languages: Sequence[str]) -> Iterator[tuple[str, str | None, str, str]]:
        """(language, group, source, text) of those of `languages` that there are; then `codes` are what it offers."""
        if self.section.language is not None:
            for split in self.section.splits or []:
                yield from self._of_column(languages, split)
            return
        from datasets import get_dataset_config_names

        subset = str(self.section.subset)
        form = re.compile(re.escape(subset).replace(re.escape(LANGUAGE), "(.+)"))
        subsets = [form.fullmatch(name) for name in self._call(get_dataset_config_names)]
        self.codes = [found[1] for found in subsets if found]
        spelled = {normalise(code): code for code in sorted(self.codes, reverse=True)}
        for tag, name in sorted(match(languages, self.codes).items(), key=lambda pair: languages.index(pair[1])):
            for split in self.section.splits or []:
                stream = self._stream(subset.replace(LANGUAGE, spelled[tag]), split)
                for number, row in enumerate(islice(stream, self.section.rows or ROWS)):
                    yield from self._texts(name, split, number, row)

    def _of_column(self, languages: Sequence[str], split: str) -> Iterator[tuple[str, str | None, str, str]]:
        """The rows of one split, the language of each in a column: read until every language has as many as wanted."""
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
            # Which code fits a language best is known at the end only: what might be one of them is kept until then.
            if len(kept[code]) < most and _might_be(code, tuple(languages)):
                kept[code].append((number, row))
                full = len(kept[code]) == most
                if full and [len(kept.get(c, [])) for c in self._wanted(languages)] == [most] * len(languages):
                    break
        for code, name in self._wanted(languages).items():
            for number, row in kept.get(code, []):
                yield from self._texts(name, split, number, row)

    def _wanted(self, languages: Sequence[str]) -> dict[str, str]:
        """Code in the column -> language, for those of `languages` that were seen, in their order."""
        given = match(languages, self.codes)
        found = {code: given[normalise(code)] for code in self.codes if normalise(code) in given}
        return dict(sorted(found.items(), key=lambda pair: languages.index(pair[1])))

    def _texts(
        self, language: str, split: str, number: int, row: Mapping[str, Any]
    ) -> Iterator[tuple[str, str | None, str, str]]:
        """The texts of one row. All of them are one group, and with them those of its translations."""
        source, columns = f"huggingface:{self.name}", self.section.text or []
        # A row that names no group is a group of its own, not one with all others that name none.
        group = f"{source}:{split}:{language}:row {number}" if len(columns) > 1 else None
        if self.section.group is not None:
            try:
                mark = str(number) if self.section.group == ROW else name_of(row[self.section.group])
            except TypeError as error:
                raise UserError(f"{self.place}: group: column {self.section.group!r} of {self.section.path!r} holds "
                                f"{error}") from None  # fmt: skip
            group = group if mark is None else f"{source}:{split}:{mark}"
        for column in columns:
            text = row[column]
            if isinstance(text, str):
                yield language, group, source, text
            elif text is not None:
                raise UserError(f"{self.place}: text: column {column!r} of {self.section.path!r} holds "
                                f"{type(text).__name__} instead of strings")  # fmt: skip

    def _stream(self, subset: str | None, split: str) -> Iterator[dict[str, Any]]:
        """The rows of a split."""
        from datasets import load_dataset

        column, group = self.section.language, self.section.group
        needed = [*(self.section.text or []), *filter(None, [column, None if group == ROW else group])]
        rows = iter(self._call(load_dataset, name=subset, split=split, streaming=True))
        while (row := self._next(rows)) is not None:
            lacking = [name for name in needed if name not in row]
            if lacking:
                raise UserError(
                    f"{self.place}: {self.section.path!r} has no column {lacking[0]!r}; it has: {', '.join(row)}"
                )
            yield row

    def _next(self, rows: Iterator[dict[str, Any]]) -> dict[str, Any] | None:
        row: dict[str, Any] | None = self._call(lambda _path, revision: next(rows, None))
        return row

    def _labels(self) -> list[str]:
        """The names behind a language column of numbers (a `ClassLabel`), in their order; else none."""
        from datasets import Features, load_dataset

        options = {"name": self.section.subset, "split": (self.section.splits or [""])[0], "streaming": True}
        stream = self._call(load_dataset, **options)
        features = stream.features
        if features is None:  # of parquet files whose card says nothing, the schema is known once one is opened
            rows = iter(stream.with_format("arrow").iter(batch_size=1))
            first = self._call(lambda _path, revision: next(rows, None))
            features = {} if first is None else Features.from_arrow_schema(first.schema)
        return list(getattr(features.get(self.section.language), "names", None) or [])

    def _code(self, value: Any, labels: Sequence[str]) -> str | None:
        """The language that a row's column names; null: none."""
        if isinstance(value, str):
            return value
        if isinstance(value, int) and labels:
            # -1 is how `datasets` writes "no label".
            return labels[value] if 0 <= value < len(labels) else None
        if value is not None:
            raise UserError(f"{self.place}: language: column {self.section.language!r} of {self.section.path!r} holds "
                            f"{type(value).__name__} instead of strings")  # fmt: skip
        return None

    def license(self) -> str | None:
        """As the card's metadata has it; null where there is none, or no card."""
        from huggingface_hub import DatasetCard

        try:
            card = DatasetCard.load(Path(self.path) / "README.md" if self.local else self.path)
        except Exception:  # a card is a courtesy: nothing fails for want of it
            return None
        found = card.data.to_dict().get("license")
        return ", ".join(found) if isinstance(found, list) else found


@cache
def _might_be(code: str, languages: tuple[str, ...]) -> bool:
    """Whether a code can be one of the languages, whatever else there is (with Albanian, `als` is Alemannic)."""
    return any(nearest_tag(name, others) == code for name in languages for others in ([code], [code, "sq"]))
