"""What the pages are made of: the files beside this module, and how a page names and holds its scripts and data."""

import base64
import hashlib
import json
from functools import cache
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup


@cache
def asset(name: str, package: str = "report") -> str:
    """The text of a file of the package `babelscope.<package>`."""
    return resources.files(f"babelscope.{package}").joinpath(name).read_text(encoding="utf-8")


def rendered(template: str, **values: Any) -> str:
    """A template with its values, each of which is escaped; a missing one is an error."""
    jinja = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return jinja.from_string(template).render(**values)


def source_hash(script: str) -> str:
    """A script as Content-Security-Policy names it, so that the browser runs these scripts and no other."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def embedded(content: Any) -> Markup:
    """JSON for a `<script type="application/json">`: nothing in it can end the element or be read as markup.

    `<`, `>`, `&`, U+2028 and U+2029 are written as JSON's own escapes; all other characters stand for themselves.

    Raises
    ------
    ValueError: a number is not finite.
    """
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)  # noqa: S704
