"""Interface messages as running text: markup, placeholders and keyboard mnemonics are removed."""

import html
import re
from contextlib import suppress

# Every pattern takes time in proportion to the length of a message, whatever its content: quantifiers are possessive
# (`*+`), and gaps are normalised before the text around them is matched.

# Marks removed text until the gap is closed.
_GAP = "\x00"

_TAG = re.compile(r"<(?P<slash>/\s*)?(?P<name>[^\W\d_][\w:-]*+)(?P<rest>[^<>]*+)>")
_CLOSING = re.compile(r"</\s*([^\W\d_][\w:-]*)")
_BREAKS = frozenset({"br", "hr", "p", "li", "ul", "ol", "div", "tr", "td", "h1", "h2", "h3", "h4", "para", "title"})

_PLACEHOLDER = re.compile(
    r"%\(\w*\)[-+#0]*+\d*+(?:\.\d+)?[A-Za-z]?"  # %(name)s, and a translator's %(name)
    r"|%(?:\d+\$)?[-+#0]*+\d*+(?:\.\d+)?(?:hh|ll|[hlzjtL])?[ds]"  # %s, %2$s, %5.1d; "% d" is prose: "100% der"
    r"|%[-+#0]*+\d*+\.\d+[A-Za-z]"  # %.2f
    r"|%[-+#0]*+\d*+(?:hh|ll|[hlzjtL])?[A-Za-z](?![A-Za-z])"  # %f, %Y; not "50%now"
    r"|%\d+"  # %1 of Qt and KDE
    r"|\{\{[^{}\n]*\}\}"  # {{name}} of Mustache and Jinja
    r"|[$%#]?\{[^{}\n]*\}"  # {}, {0}, {name:>5}, ${name}, %{name}
)
_PERCENT = re.compile(r"\x00\s?\x01")  # the percent sign of a removed number: "%(share)s%% done"
_CONSTANT = re.compile(r"(?<=[A-Z])_(?=[A-Z])")  # part of a name such as LC_MESSAGES, not a mnemonic
_BRACKETED_MNEMONIC = re.compile(r"(?<!\s)\s*[(（][_&][A-Za-z0-9][)）]")  # as in Chinese and Japanese

_EMPTY = re.compile(
    r"""\([\s\x00]*\)|\[[\s\x00]*\]|（[\s\x00]*）|«[\s\x00]*»|「[\s\x00]*」|(?<!`)`++[\s\x00]*\x00[\s\x00]*`++"""
    r"""|["“”„][\s\x00]*\x00[\s\x00]*["“”]|['‘’‚][\s\x00]*\x00[\s\x00]*['‘’]"""
)
_GAP_BEFORE_STOP = re.compile(r"\x00 ?(?=[.,;:!?)\]。、，；：！？）])")
_SPACES = re.compile(r"[\s\x00]+")
_LEADING = re.compile(r"^[\s.,;:!?)\]–—。、，；：！？）-]+")


def running_text(message: str) -> str:
    """Reduce a gettext message to the words that a user of the interface sees, in one line.

    It removes HTML and Pango tags, the placeholders of printf, Python (`%(name)s`, `{name}`), Jinja (`{{name}}`) and Qt
    (`%1`), the mnemonics `_` and `&`, and the brackets and quotation marks that this leaves empty. Entities become
    characters, `<words>` that are not tags lose the brackets, and page names such as `Edit_a_note` the underscores.
    """
    with suppress(ValueError):  # raised for `&#` with more digits than Python converts; the text then stays as it is
        message = html.unescape(message)
    text = _without_tags(message)
    text = _PLACEHOLDER.sub(_GAP, text.replace("%%", "\x01"))
    text = _PERCENT.sub(_GAP, text).replace("\x01", "%")
    text = _BRACKETED_MNEMONIC.sub("", text)
    text = _CONSTANT.sub(" ", text)
    text = text.replace("_", "" if text.count("_") == 1 else " ")
    if text.count("&") == 1:
        text = re.sub(r"&(?=\w)", "", text)
    return _close_gaps(text)


def _without_tags(text: str) -> str:
    closed = set(_CLOSING.findall(text)) | _BREAKS

    def replace(match: re.Match[str]) -> str:
        name, rest = match["name"], match["rest"]
        if name.lower() in _BREAKS:
            return "\n"
        markup = match["slash"] or name in closed or rest.endswith("/") or "=" in rest
        return _GAP if markup else name + rest

    return _TAG.sub(replace, text)


def _close_gaps(text: str) -> str:
    if _GAP in text:
        for _ in range(2):  # twice, for brackets inside quotation marks
            text = _EMPTY.sub(_GAP, _SPACES.sub(_one_gap, text))
        text = _GAP_BEFORE_STOP.sub("", _SPACES.sub(_one_gap, text))
        text = text.replace(_GAP, "")
        text = _LEADING.sub("", text)
    return " ".join(text.split())


def _one_gap(spaces: re.Match[str]) -> str:
    """Merge gaps and the white space around them into one gap, followed by a space if there was white space."""
    found = spaces[0]
    if _GAP not in found:
        return found
    return f"{_GAP} " if found.strip(_GAP) else _GAP
