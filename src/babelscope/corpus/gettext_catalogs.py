"""Texts from gettext catalogs (.mo, .po) in installed packages or in a folder."""

import functools
import hashlib
import logging
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import polib

from babelscope.config.schema import Corpus
from babelscope.config.values import expanded
from babelscope.core.errors import UserError, nearest
from babelscope.corpus.languages import match, normalise, require
from babelscope.corpus.messages import running_text
from babelscope.models.packaged import files_of

log = logging.getLogger(__name__)

# Messages whose translation is the translators' names or addresses (GNOME, KDE).
_CREDITS = frozenset({"translator-credits", "translator_credits", "Your names", "Your emails"})


class Catalog(NamedTuple):
    """One catalog file: its language as the path spells it, and its domain (None for `<lang>.po`)."""

    language: str
    domain: str | None
    path: Path


def read(section: Corpus, languages: Sequence[str]) -> pl.DataFrame:
    """Read the messages of `languages` as running text from `section.packages`, or from the folder `section.path`.

    The texts in `section.source_language` are the message ids of the messages that are translated into another of the
    `languages` (into any language, if `languages` holds no other). An entry with plural forms gives one text: its last
    form ("many" or "other", which most numbers take) with the plural message id. The header, translators' credits, and
    fuzzy, obsolete and untranslated entries are dropped.

    `group` is a hash of the words of the message id, without case, punctuation, placeholders and context. All
    translations of a sentence share it in every package, and so do sentences that differ only in what was removed.

    Returns
    -------
    `language` (as in `languages`), `group`, `source` (`gettext:<package>` or `gettext:<folder>`) and `text`, in the
    order of packages, files and entries, with repetitions. Languages that a package lacks are logged.

    Raises
    ------
    UserError: a package, folder or domain does not exist, no package has one of the languages, or a catalog cannot be
        read.
    """
    offered: dict[str, set[str]] = {}
    parts = []
    for name, found in _packages(section):
        source = f"gettext:{name}"
        catalogs = _of_domain(found, section.domain, name)
        offered[source] = {c.language for c in catalogs} | {section.source_language}
        frame = _texts(catalogs, match(languages, offered[source]), section.source_language, source)
        parts.append(frame)
        present = set(frame["language"].unique())
        missing = [language for language in languages if language not in present]
        if missing:
            log.warning("%s has no messages in %s", source, ", ".join(missing))
    require(languages, offered)
    return pl.concat(parts)


def _texts(catalogs: list[Catalog], asked: Mapping[str, str], source_language: str, source: str) -> pl.DataFrame:
    """The messages of one package; `asked` maps the normalised tags of its languages to their names in params.yaml."""
    origin = normalise(source_language)
    wanted = [c for c in catalogs if normalise(c.language) in asked and normalise(c.language) != origin]
    rows: list[tuple[str, str, str, str]] = []
    for catalog in wanted or catalogs:
        language = asked.get(normalise(catalog.language))
        for original, translation in _messages(catalog.path):
            group = _group(original)
            if language is not None and wanted:
                rows.append((language, group, source, translation))
            if origin in asked:
                rows.append((asked[origin], group, source, original))
    log.info("%s: %d catalogs of %d read", source, len(wanted or catalogs), len(catalogs))
    return pl.DataFrame(rows, dict.fromkeys(("language", "group", "source", "text"), pl.String), orient="row")


def _packages(section: Corpus) -> Iterator[tuple[str, list[Catalog]]]:
    """Yield the name of each package (or of the folder) and its catalogs in a fixed order."""
    if not section.packages:
        folder = expanded(str(section.path))
        if not folder.is_dir():
            raise UserError(f"params.yaml: corpus.path: no folder {str(section.path)!r}; set it to one with catalogs")
        paths = [path for suffix in ("mo", "po") for path in folder.rglob(f"*.{suffix}")]
        name = folder.resolve().name
        yield name, _catalogs(name, paths, "path", folder)
    for name in section.packages:
        files = files_of(name)
        if files is None:
            raise UserError(f"params.yaml: corpus.packages: no installed package {name!r}; install it, or set "
                            "corpus.path to a folder of catalogs")  # fmt: skip
        yield name, _catalogs(name, [path for path in files if path.suffix in (".mo", ".po")], "packages")


def _catalogs(name: str, paths: list[Path], key: str, folder: Path | None = None) -> list[Catalog]:
    found = []
    compiled = {path.with_suffix("") for path in paths if path.suffix == ".mo"}
    for path in paths:
        if path.suffix == ".po" and path.with_suffix("") in compiled:
            continue  # its compiled catalog is read instead, which has no fuzzy messages
        if path.parent.name == "LC_MESSAGES":
            found.append(Catalog(path.parent.parent.name, path.stem, path))
        elif path.parent == folder:
            found.append(Catalog(path.stem, None, path))
    if not found:
        raise UserError(f"params.yaml: corpus.{key}: {name!r} holds no catalogs (<language>/LC_MESSAGES/<domain>.mo or "
                        ".po, or <language>.po in the folder itself)")  # fmt: skip
    return sorted(found, key=lambda c: (c.language, c.domain or "", c.path))


def _of_domain(catalogs: list[Catalog], domain: str | None, name: str) -> list[Catalog]:
    chosen = [c for c in catalogs if domain is None or c.domain in (domain, None)]
    if not chosen:
        allowed = nearest(str(domain), {c.domain for c in catalogs if c.domain is not None})
        raise UserError(f"params.yaml: corpus.domain: {name!r} has no domain {domain!r}; {allowed}")
    return chosen


def _messages(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the message id and the translation of each translated entry, both as running text."""
    for entry in _entries(path):
        original, translation = entry.msgid_plural or entry.msgid, entry.msgstr
        if entry.msgstr_plural:
            translation = entry.msgstr_plural[max(entry.msgstr_plural)]
        original = original.rpartition("\x04")[2]  # without the context
        if original in _CREDITS:
            continue
        original, translation = _source_text(original), running_text(translation)
        if original and translation and original != translation:
            yield original, translation


def _entries(path: Path) -> list[Any]:
    """The entries of a .mo or .po file, except the header and fuzzy and obsolete entries."""
    try:
        if path.suffix == ".mo":
            _check_whole(path.read_bytes())
        found = polib.mofile(str(path)) if path.suffix == ".mo" else polib.pofile(str(path))
        return [entry for entry in found if entry.msgid and not (entry.obsolete or getattr(entry, "fuzzy", False))]
    except Exception as error:  # a damaged file makes polib raise errors of many types
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: not a readable gettext catalog: {reason}") from None


def _check_whole(mo: bytes) -> None:
    """Raise a ValueError if a string of a .mo file ends beyond the file, since polib would return a part of it."""
    order = "<" if mo[:4] == b"\xde\x12\x04\x95" else ">"
    count, *tables = struct.unpack_from(f"{order}3I", mo, 8)
    for start in tables:
        table = struct.unpack_from(f"{order}{2 * count}I", mo, start)
        if any(offset + length >= len(mo) for length, offset in zip(table[::2], table[1::2], strict=True)):
            raise ValueError("the file is cut off")


# The catalogs of a package hold the same message ids, one catalog after the other.
_source_text = functools.lru_cache(2**16)(running_text)


@functools.lru_cache(2**16)
def _group(original: str) -> str:
    words = re.sub(r"[\W_]+", " ", original).strip().casefold()
    return hashlib.blake2b((words or original).encode(), digest_size=8).hexdigest()
