"""Matching the languages of params.yaml with the names that catalogs and files carry."""

import difflib
from collections.abc import Iterable, Mapping, Sequence

import langcodes

from babelscope.errors import UserError

# By CLDR's distances (`langcodes`): another region of the same language passes (de-AT for de), another script does not
# (sr-Latn for sr-Cyrl), nor one that its speakers merely understand (hr for bs).
_FARTHEST = 4

# POSIX locale modifiers that BCP-47 spells as a script or a variant.
_MODIFIERS = {"latin": "latn", "cyrillic": "cyrl", "devanagari": "deva"}


def normalise(tag: str) -> str:
    """One spelling for BCP-47 tags and POSIX locales: `pt_BR.UTF-8` and `pt-BR` give `pt-br`, `sr@latin` `sr-latn`."""
    name, _, modifier = tag.partition("@")
    parts = name.partition(".")[0].replace("_", "-").lower()
    return f"{parts}-{_MODIFIERS.get(modifier.lower(), modifier.lower())}" if modifier else parts


def nearest_tag(language: str, offered: Iterable[str]) -> str | None:
    """The one of `offered` that is the same language, however either is spelled: `zh-CN` is `zho_Hans`, `de` `deu`.

    Parameters
    ----------
    language: a BCP-47 tag.
    offered: tags, ISO 639-3 codes, or codes with a script as FLORES and FineWeb-2 write them (`nob_Latn` is `no`).
    """
    # FineWeb-2 writes Chinese in both its scripts as `cmn_Hani`.
    names = {name.replace("_", "-").removesuffix("-Hani"): name for name in sorted(offered, reverse=True)}
    valid = [name for name in names if langcodes.tag_is_valid(name)]
    if not langcodes.tag_is_valid(language):
        return None
    found, distance = langcodes.closest_match(language, valid, max_distance=_FARTHEST + 1)
    return names[found] if distance <= _FARTHEST else None


def match(languages: Iterable[str], offered: Iterable[str]) -> dict[str, str]:
    """Normalised tag of each of `languages` that is offered -> its spelling in `languages`.

    A language that is offered under another name only (`deu` for `de`) is there under that name's normalised tag.

    Parameters
    ----------
    languages: the languages as params.yaml spells them.
    offered: the languages as the source spells them.

    Raises
    ------
    UserError: two of `languages` are the same one.
    """
    names = {normalise(name): name for name in sorted(offered)}
    asked: dict[str, str] = {}
    for language in languages:
        tag = normalise(language)
        if tag in asked:
            raise UserError(f"params.yaml: languages: {asked[tag]!r} and {language!r} are the same language")
        asked[tag] = language
    found = {tag: language for tag, language in asked.items() if tag in names}
    for tag, language in asked.items():
        if tag not in names and (other := nearest_tag(language, names.values())) is not None:
            found.setdefault(normalise(other), language)
    return found


def require(languages: Sequence[str], offered: Mapping[str, Iterable[str]]) -> None:
    """Raise a UserError if one of `languages` is in none of the sources.

    Parameters
    ----------
    languages: the languages as params.yaml spells them.
    offered: the name of each source (`gettext:gramps`) -> the languages that it has, as it spells them.
    """
    there = {language for names in offered.values() for language in match(languages, names).values()}
    missing = [language for language in languages if language not in there]
    if missing:
        names = {normalise(name): name.replace("_", "-") for found in offered.values() for name in sorted(found)}
        close = difflib.get_close_matches(normalise(missing[0]), names, n=1, cutoff=0.5)
        hint = f" (did you mean {names[close[0]]!r}?)" if close else ""
        have, offer = ("has", "it offers") if len(offered) == 1 else ("have", "they offer")
        allowed = ", ".join(names[tag] for tag in sorted(names))
        raise UserError(f"params.yaml: languages: {' and '.join(offered)} {have} no {', '.join(map(repr, missing))}; "
                        f"{offer}: {allowed or 'nothing'}{hint}")  # fmt: skip
