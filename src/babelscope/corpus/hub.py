"""Texts from data sets in the Hugging Face hub's format: hub ids, or local folders laid out alike; streamed.

The ready-made entries follow each data set's card: which subset holds a language, which columns the texts, and what is
the same in translations of each other. Codes of languages are matched by `languages.nearest_tag`.
"""

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import polars as pl

from babelscope.corpus.languages import nearest_tag, normalise
from babelscope.errors import UserError
from babelscope.sections import Dataset

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
        "rows": 200_000,  # of all languages together
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
    twice = [name for name in languages if [normalise(other) for other in languages].count(normalise(name)) > 1]
    if twice:
        raise UserError(f"params.yaml: languages: {' and '.join(map(repr, twice))} are the same language")
    rows: list[tuple[str, str | None, str, str]] = []
    records, offered = [], {}
    for number, section in enumerate(sections):
        known, place = entry(section), f"params.yaml: {key}.{number}" if len(sections) > 1 else f"params.yaml: {key}"
        if known.revision is None and not Path(str(known.path)).expanduser().is_dir():
            log.warning("%s: %s is not pinned; set its revision to a commit hash", place, known.path)
        found = _DataSet(known, place)
        where = found.languages(languages)
        offered.update(where)
        for row in found.rows(where):
            rows.append(row)
            if len(rows) % 1000 == 0:
                advance(1000)
        records.append({"path": found.name, "revision": known.revision, "license": found.license()})
    missing = [name for name in languages if name not in offered]
    if missing:
        paths = ", ".join(str(record["path"]) for record in records)
        raise UserError(f"params.yaml: languages: {', '.join(map(repr, missing))} in none of {paths}")
    return pl.DataFrame(rows, schema=_SCHEMA, orient="row"), records


class _DataSet:
    """One data set: which languages it has, and its rows."""

    def __init__(self, section: Dataset, place: str) -> None:
        self.section, self.place = section, place
        folder = Path(str(section.path)).expanduser()
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

    def languages(self, wanted: Sequence[str]) -> dict[str, str]:
        """Those of `wanted` that there are, and what each is called here (in the subsets' names, or in the column)."""
        column, subset = self.section.language, self.section.subset or ""
        if column is None:
            from datasets import get_dataset_config_names

            form = re.compile(re.escape(subset).replace(re.escape(LANGUAGE), "(.+)"))
            subsets = [form.fullmatch(name) for name in self._call(get_dataset_config_names)]
            codes = [found[1] for found in subsets if found]
        else:
            codes = self._codes() or sorted({self._code(row[column]) for row in self._stream(self.section.subset)})
        here = {name: nearest_tag(name, codes) for name in wanted}
        return {name: code for name, code in here.items() if code is not None}

    def rows(self, where: Mapping[str, str]) -> Iterator[tuple[str, str | None, str, str]]:
        """(language, group, source, text) of the languages in `where`."""
        column = self.section.language
        if column is not None:
            names = {code: name for name, code in where.items()}
            for number, row in enumerate(self._stream(self.section.subset)):
                if (name := names.get(self._code(row[column]))) is not None:
                    yield from self._texts(name, number, row)
            return
        for name, code in where.items():
            for number, row in enumerate(self._stream(str(self.section.subset).replace(LANGUAGE, code))):
                yield from self._texts(name, number, row)

    def _texts(self, language: str, number: int, row: Mapping[str, Any]) -> Iterator[tuple[str, str | None, str, str]]:
        source = f"huggingface:{self.name}"
        for column in self.section.text or []:
            text = row[column]
            if isinstance(text, str):
                group = None
                if self.section.group is not None:
                    mark = number if self.section.group == ROW else row[self.section.group]
                    # A row that names no group is a group of its own, not one with all others that name none.
                    group = None if mark is None else f"{source}:{row['__split__']}:{column}:{mark}"
                yield language, group, source, text

    def _stream(self, subset: str | None) -> Iterator[dict[str, Any]]:
        """The first rows of every split, with the split's name."""
        from datasets import load_dataset

        column, group = self.section.language, self.section.group
        needed = [*(self.section.text or []), *filter(None, [column, None if group == ROW else group])]
        for split in self.section.splits or []:
            stream = self._call(load_dataset, name=subset, split=split, streaming=True)
            rows = iter(islice(stream, self.section.rows or ROWS))
            while (row := self._next(rows)) is not None:
                lacking = [name for name in needed if name not in row]
                if lacking:
                    raise UserError(
                        f"{self.place}: {self.section.path!r} has no column {lacking[0]!r}; it has: {', '.join(row)}"
                    )
                yield {**row, "__split__": split}

    def _next(self, rows: Iterator[dict[str, Any]]) -> dict[str, Any] | None:
        row: dict[str, Any] | None = self._call(lambda _path, revision: next(rows, None))
        return row

    def _codes(self) -> list[str]:
        """The names behind a language column of numbers (a `ClassLabel`), in their order; else none."""
        from datasets import load_dataset

        if not hasattr(self, "_labels"):
            options = {"name": self.section.subset, "split": (self.section.splits or [""])[0], "streaming": True}
            stream = self._call(load_dataset, **options)
            # Of parquet files whose card says nothing, the features are known once one is opened.
            features = stream.features or self._call(lambda _path, revision: stream._resolve_features()).features or {}
            self._labels = list(getattr(features.get(self.section.language), "names", None) or [])
        return self._labels

    def _code(self, value: Any) -> str:
        names = self._codes()
        # -1 is how `datasets` writes "no label".
        return names[value] if isinstance(value, int) and 0 <= value < len(names) else str(value)

    def license(self) -> str | None:
        """As the card's metadata has it; null where there is none, or no card."""
        from huggingface_hub import DatasetCard

        try:
            card = DatasetCard.load(Path(self.path) / "README.md" if self.local else self.path)
        except Exception:  # a card is a courtesy: nothing fails for want of it
            return None
        found = card.data.to_dict().get("license")
        return ", ".join(found) if isinstance(found, list) else found
