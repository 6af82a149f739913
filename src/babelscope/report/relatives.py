"""What is known of a language from elsewhere: the branch of its family, and the script that it is mostly written in."""

import langcodes
import polars as pl

# Branches as in Glottolog 5 (Hammarstroem et al.).
_BRANCHES = {
    "Romance": "ca es fr gl it oc pt ro", "Germanic": "af da de en fy is lb nb nl nn no sv yi",
    "Slavic": "be bg bs cs hr mk pl ru sk sl sr uk", "Baltic": "lt lv", "Celtic": "br cy ga gd", "Greek": "el",
    "Albanian": "sq", "Armenian": "hy", "Indo-Aryan": "as bn gu hi mr ne or pa sd si ur", "Iranian": "fa ku ps tg",
    "Uralic": "et fi hu", "Turkic": "az kk ky tr tt uz", "Mongolic": "mn", "Kartvelian": "ka", "Basque": "eu",
    "Semitic": "am ar he mt ti", "Cushitic": "so", "Bantu": "rw sn st sw xh zu", "Volta-Congo": "ig yo",
    "Chadic": "ha", "Dravidian": "kn ml ta te", "Sinitic": "yue zh", "Japonic": "ja", "Koreanic": "ko",
    "Burmo-Qiangic": "my", "Bodic": "bo", "Austroasiatic": "km vi", "Tai": "lo th",
    "Austronesian": "ceb fil id jv mg mi ms su", "Quechuan": "qu quy", "Constructed": "eo",
}  # fmt: skip
_BRANCH = {code: branch for branch, codes in _BRANCHES.items() for code in codes.split()}
# Names of ISO 15924 codes; langcodes alone, without its data package, has none.
_SCRIPTS = {
    "Arab": "Arabic", "Armn": "Armenian", "Beng": "Bengali", "Cyrl": "Cyrillic", "Deva": "Devanagari",
    "Ethi": "Ethiopic", "Geor": "Georgian", "Grek": "Greek", "Gujr": "Gujarati", "Guru": "Gurmukhi", "Hans": "Han",
    "Hant": "Han", "Hebr": "Hebrew", "Jpan": "Japanese", "Khmr": "Khmer", "Knda": "Kannada", "Kore": "Korean",
    "Laoo": "Lao", "Latn": "Latin", "Mlym": "Malayalam", "Mymr": "Myanmar", "Orya": "Odia", "Sinh": "Sinhala",
    "Taml": "Tamil", "Telu": "Telugu", "Thai": "Thai", "Tibt": "Tibetan",
}  # fmt: skip


def relation(first: str, second: str) -> str | None:
    """How two languages are related: "same branch", "same script" (of another branch) or "neither".

    None if the branch of one is not known here.
    """
    one, two = relatives(first), relatives(second)
    if one is None or two is None:
        return None
    return "same branch" if one[0] == two[0] else "same script" if one[1] == two[1] else "neither"


def means_by_relation(pairs: pl.DataFrame) -> dict[str, float]:
    """The mean `value` of the pairs of languages of each `relation` that occurs, which has the page's name for it."""
    means = dict(pairs.drop_nulls("value").group_by("relation").agg(pl.col("value").mean()).iter_rows())
    names = {"same branch": "same branch", "same script": "same script, other branch", "neither": "neither"}
    return {name: means[kind] for kind, name in names.items() if kind in means}


def relatives(language: str) -> tuple[str, str] | None:
    """(branch, script) of a BCP-47 tag, e.g. ("Romance", "Latin") of pt-BR; None if its branch is not known here."""
    if not langcodes.tag_is_valid(language):
        return None
    tag = langcodes.Language.get(language)
    # Some are known as a part of a macrolanguage only: Mandarin (cmn) as Chinese (zh).
    code = next((code for code in (tag.language, tag.prefer_macrolanguage().language) if code in _BRANCH), None)
    script = str(tag.maximize().script)  # that of the tag, or the one that CLDR has as likely
    return (_BRANCH[code], _SCRIPTS.get(script, script)) if code else None
