"""Match the languages of params.yaml with the codes that catalogs, files, data sets and fastText use."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import NamedTuple

import langcodes
from langcodes.data_dicts import LANGUAGE_ALPHA3, LIKELY_SUBTAGS, MACROLANGUAGES

from babelscope.core.errors import UserError

# Two regions match up to this distance of CLDR (`langcodes`): de-CH matches de-AT, pt-BR does not match pt-PT.
_FARTHEST_REGION = 4

# POSIX locale modifiers that BCP-47 spells as a script or a variant.
_MODIFIERS = {"latin": "latn", "cyrillic": "cyrl", "devanagari": "deva"}

# Wikipedia's codes that are older than BCP-47, and ISO 639-3 codes that CLDR writes as a language with a script.
_ALIASES = {
    "bat-smg": "sgs", "be-x-old": "be-tarask", "cbk-zam": "cbk", "fiu-vro": "vro", "roa-rup": "rup",
    "zh-classical": "lzh", "zh-min-nan": "nan", "zh-yue": "yue",
    "azb": "az-arab", "ckb": "ku-arab", "pnb": "pa-arab",
}  # fmt: skip
# Scripts that are a part or a style of another script.
_SCRIPTS = {"Hang": "Kore", "Hira": "Jpan", "Kana": "Jpan", "Hrkt": "Jpan", "Aran": "Arab", "Latf": "Latn",
            "Latg": "Latn"}  # fmt: skip
# The usual script of languages for which CLDR names another one.
_WRITTEN = {"crh": "Latn"}
# For Serbo-Croatian, `langcodes` gives Serbian in Latin script, which is only one of its standards.
_SERBO_CROATIAN = frozenset({"sh", "hbs"})
# Macrolanguages whose name means one standard language: their other members (Cantonese, Egyptian Arabic, Indonesian)
# do not match it. A member of any other macrolanguage, such as Pashto, Quechua or Fula, matches the macrolanguage.
_STANDARD = frozenset(
    ["ar", "az", "et", "fa", "ku", "lv", "mn", "ms", "ne", "no", "or", "sh", "sq", "sw", "uz", "yi", "zh"]
)
# The largest number of languages that a message lists; some data sets have 1,800.
_LISTED = 60


class _Tag(NamedTuple):
    """A parsed code; `script` and `region` are None if it does not name them."""

    language: str
    script: str | None
    region: str | None
    variants: tuple[str, ...]
    replaced: bool  # whether `langcodes` gives the language another code: `fil` for `tgl`

    @property
    def written(self) -> str | None:
        """The script that the code names, or else the language's usual script; None if that is unknown."""
        if self.script or self.language in _WRITTEN:
            return self.script or _WRITTEN[self.language]
        tag = f"{self.language}-{self.region}" if self.region else self.language
        if tag not in LIKELY_SUBTAGS and self.language not in LIKELY_SUBTAGS:
            return None
        return langcodes.Language.get(tag).maximize().script


def normalise(tag: str) -> str:
    """One spelling for BCP-47 tags and POSIX locales: `pt_BR.UTF-8` and `pt-BR` give `pt-br`, `sr@latin` `sr-latn`."""
    name, _, modifier = tag.partition("@")
    parts = name.partition(".")[0].replace("_", "-").lower()
    return f"{parts}-{_MODIFIERS.get(modifier.lower(), modifier.lower())}" if modifier else parts


@cache
def _parse(name: str) -> _Tag | None:
    """Parse a code; None if it is not registered."""
    # FineWeb-2 writes Chinese in both its scripts as `cmn_Hani`.
    code = normalise(name).removesuffix("-hani")
    first, _, rest = code.partition("-")
    code = _ALIASES.get(code) or "-".join(filter(None, [_ALIASES.get(first, first), rest]))
    code = code.replace("-arab-arab", "-arab").replace("-arab-latn", "-latn")
    if not langcodes.tag_is_valid(code):
        return None
    tag = langcodes.Language.get(code)
    if tag.language in (None, "und", "mul", "zxx"):  # no language, or several
        return None
    macro = tag.prefer_macrolanguage()
    language = "sh" if first in _SERBO_CROATIAN else "no" if macro.language == "nb" else str(macro.language)
    script = None if first in _SERBO_CROATIAN and tag.script == "Latn" else tag.script
    replaced = LANGUAGE_ALPHA3.get(language, language) not in (first, LANGUAGE_ALPHA3.get(first))
    script = _SCRIPTS.get(script, script) if script else None
    return _Tag(language, script, tag.territory, tuple(tag.variants or ()), replaced)


def _distance(wanted: _Tag, offered: _Tag, others: Sequence[_Tag]) -> tuple[int, ...] | None:
    """The distance from the wanted to the offered tag as a sort key; None if they are different languages.

    `others`: all tags that are offered. A member of a macrolanguage (`pbt` of `ps`), and a script of a language without
    a two-letter code, match only if no other member or script is offered.
    """
    same = wanted.language == offered.language
    if not same:
        macro = {MACROLANGUAGES.get(wanted.language), MACROLANGUAGES.get(offered.language)} - {None}
        if not macro & {wanted.language, offered.language} or macro & _STANDARD:
            return None
        if len({tag.language for tag in others if MACROLANGUAGES.get(tag.language) in macro}) > 1:
            return None
    scripts = {tag.written for tag in others if tag.language == offered.language}
    other_script = None not in (wanted.written, offered.written) and wanted.written != offered.written
    # CLDR rarely knows the script of a language without a two-letter code.
    if other_script and (wanted.script or len(scripts) > 1 or (same and len(wanted.language) == 2)):
        return None
    if wanted.region == offered.region:
        region = 0
    elif wanted.region is None or offered.region is None:
        region = 1
    else:
        region = langcodes.tag_distance(f"{wanted.language}-{wanted.region}", f"{wanted.language}-{offered.region}")
        if region > _FARTHEST_REGION:
            return None
    # The language's usual region is preferred: `pt` matches `pt-BR` even if `pt-PT` is offered, too.
    usual = langcodes.Language.get(wanted.language).maximize().territory
    return (
        int(not same), int(other_script), region, int(wanted.variants != offered.variants),
        int(offered.region not in (None, usual)), int(offered.replaced),
    )  # fmt: skip


def _nearest(language: str, offered: Iterable[str]) -> tuple[tuple[int, ...], str] | None:
    names = sorted(set(offered))
    tags = {name: tag for name in names if (tag := _parse(name)) is not None}
    languages = {tag.language for name, tag in tags.items() if normalise(name) != "als"}
    # `als` is Alemannic (as in Wikipedia, WiLI and fastText) if Albanian is offered, too, and otherwise Tosk Albanian.
    alemannic = {name for name in names if normalise(name) == "als" and "sq" in languages and "gsw" not in languages}
    exact = [name for name in names if normalise(name) == normalise(language) and name not in alemannic]
    if exact:
        return (0,), exact[0]
    wanted = _parse(language)
    if wanted is None:
        return None
    tags |= {name: tag for name in alemannic if (tag := _parse("gsw")) is not None}
    others = list(tags.values())
    found = [(distance, name) for name, tag in tags.items() if (distance := _distance(wanted, tag, others))]
    return min(found, default=None)


def nearest_tag(language: str, offered: Iterable[str]) -> str | None:
    """The code in `offered` that means the same language, or None: `zho_Hans` for `zh-CN`, `deu` for `de`.

    A code with a region matches the language without one, and the other way round (`en-GB`, `en`). A different script
    is a different language (`sr-Latn`, `srp_Cyrl`), and so are mutually intelligible languages (`hr`, `bs`).

    Parameters
    ----------
    language: a code of any kind that `offered` may hold.
    offered: BCP-47 tags, ISO 639-3 codes, Wikipedia's codes, or codes with a script as in FLORES and FineWeb-2
        (`nob_Latn` matches `no`).
    """
    found = _nearest(language, offered)
    return found[1] if found else None


def match(languages: Iterable[str], offered: Iterable[str]) -> dict[str, str]:
    """Map each offered code that matches a language, normalised, to that language as `languages` spells it.

    A code is matched with one language only, the one that it fits best: of [de-AT, de], `de` is matched with `de`.

    Raises
    ------
    UserError: two of `languages` are the same language.
    """
    names = sorted(offered)
    asked: dict[str, str] = {}
    for language in languages:
        tag = normalise(language)
        if tag in asked:
            raise UserError(f"params.yaml: languages: {asked[tag]!r} and {language!r} are the same language")
        asked[tag] = language
    wishes = [(found, language) for language in asked.values() if (found := _nearest(language, names))]
    given: dict[str, str] = {}
    for (_, name), language in sorted(wishes, key=lambda wish: wish[0][0]):
        given.setdefault(normalise(name), language)
    return given


def require(languages: Sequence[str], offered: Mapping[str, Iterable[str]]) -> None:
    """Raise a UserError if no source has one of the `languages`.

    `offered` maps the name of each source (`gettext:gramps`) to its languages, as the source spells them.
    """
    given = [match(languages, names) for names in offered.values()]
    missing = [language for language in languages if all(language not in found.values() for found in given)]
    if not missing:
        return
    have, offer = ("has", "it offers") if len(offered) == 1 else ("have", "they offer")
    names = {normalise(name): name.replace("_", "-") for found in offered.values() for name in sorted(found)}
    for found in given:
        other = nearest_tag(missing[0], [names[tag] for tag in found])
        if other is not None:
            raise UserError(f"params.yaml: languages: {' and '.join(offered)} {have} only {other!r} for both "
                            f"{found[normalise(other)]!r} and {missing[0]!r}; keep one of them")  # fmt: skip
    close = difflib.get_close_matches(normalise(missing[0]), names, n=1, cutoff=0.5)
    hint = f" (did you mean {names[close[0]]!r}?)" if close else ""
    allowed = ", ".join(names[tag] for tag in sorted(names)[:_LISTED]) + (", ..." if len(names) > _LISTED else "")
    raise UserError(f"params.yaml: languages: {' and '.join(offered)} {have} no {', '.join(map(repr, missing))}; "
                    f"{offer}: {allowed or 'nothing'}{hint}")  # fmt: skip
