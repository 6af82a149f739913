"""What is known of languages from elsewhere: the branch of its family and the script that each is mostly written in."""

import langcodes

# Branches as in Glottolog 5 (Hammarstroem et al.), scripts as ISO 15924 names them in Unicode's CLDR.
_KNOWN = {
    "Romance": {"Latin": "ca es fr gl it oc pt ro", "Cyrillic": "mo"},
    "Germanic": {"Latin": "af da de en fy is lb nb nl nn no sv", "Hebrew": "yi"},
    "Slavic": {"Latin": "bs cs hr pl sk sl", "Cyrillic": "be bg mk ru sr uk"},
    "Baltic": {"Latin": "lt lv"},
    "Celtic": {"Latin": "br cy ga gd"},
    "Greek": {"Greek": "el"},
    "Albanian": {"Latin": "sq"},
    "Armenian": {"Armenian": "hy"},
    "Indo-Aryan": {"Devanagari": "hi mr ne", "Bengali": "as bn", "Gujarati": "gu", "Gurmukhi": "pa", "Arabic": "sd ur",
                   "Sinhala": "si", "Odia": "or"},
    "Iranian": {"Arabic": "fa pes ps", "Latin": "ku", "Cyrillic": "tg"},
    "Uralic": {"Latin": "et fi hu"},
    "Turkic": {"Latin": "az tr uz", "Cyrillic": "kk ky tt"},
    "Mongolic": {"Cyrillic": "mn"},
    "Kartvelian": {"Georgian": "ka"},
    "Basque": {"Latin": "eu"},
    "Semitic": {"Arabic": "ar arb", "Hebrew": "he iw", "Ethiopic": "am ti", "Latin": "mt"},
    "Cushitic": {"Latin": "so"},
    "Bantu": {"Latin": "rw sn st sw swh xh zu"},
    "Volta-Congo": {"Latin": "ig yo"},
    "Chadic": {"Latin": "ha"},
    "Dravidian": {"Kannada": "kn", "Malayalam": "ml", "Tamil": "ta", "Telugu": "te"},
    "Sinitic": {"Han": "yue zh"},
    "Japonic": {"Japanese": "ja"},
    "Koreanic": {"Korean": "ko"},
    "Burmo-Qiangic": {"Myanmar": "my"},
    "Bodic": {"Tibetan": "bo"},
    "Austroasiatic": {"Latin": "vi", "Khmer": "km"},
    "Tai": {"Lao": "lo", "Thai": "th"},
    "Austronesian": {"Latin": "ceb fil id jv mg mi ms su tl"},
    "Quechuan": {"Latin": "qu quy"},
    "Constructed": {"Latin": "eo"},
}  # fmt: skip
_BY_CODE = {
    code: (branch, script)
    for branch, scripts in _KNOWN.items()
    for script, codes in scripts.items()
    for code in codes.split()
}
_SCRIPTS = {"arab": "Arabic", "cyrl": "Cyrillic", "deva": "Devanagari", "latn": "Latin", "hans": "Han", "hant": "Han"}


def relatives(language: str) -> tuple[str, str] | None:
    """(branch, script) of a BCP-47 tag, e.g. ("Romance", "Latin") of pt-BR; None where it is not known here."""
    code, *parts = language.lower().replace("_", "-").split("-")
    if code not in _BY_CODE and langcodes.tag_is_valid(code):
        code = langcodes.Language.get(code).prefer_macrolanguage().language or code  # deu is de, arb ar
    if code not in _BY_CODE:
        return None
    branch, script = _BY_CODE[code]
    return branch, next((_SCRIPTS[part] for part in parts if part in _SCRIPTS), script)
