"""`babelscope try TEXT`: the tokens of a sentence with the features that fire on them, and its language."""

import os
import sys
from pathlib import Path

from babelscope import config
from babelscope.core.files import write_atomically
from babelscope.core.paths import Paths
from babelscope.core.terminal import aligned
from babelscope.playground import page
from babelscope.playground.reading import Reader, Reading

# Features named on a token, and languages named with their scores.
_FEATURES, _LANGUAGES = 4, 3


def main(text: str, html: Path | None) -> None:
    """Print what a sentence shows to the standard output, and write it as a page if `html` names a file."""
    params, paths = config.load(), Paths(Path())
    reader = Reader(params, paths)
    reading = reader.read(text)
    sys.stdout.write(shown(reader, reading) + "\n")
    if html is not None:
        browser = paths.reports / "features.html"
        link = Path(os.path.relpath(browser, html.parent)).as_posix() if browser.is_file() else None
        content = page.build(reader, paths, text=text, reading=reading, browser=link)
        write_atomically(html, lambda path: path.write_text(content, encoding="utf-8"))


def shown(reader: Reader, reading: Reading) -> str:
    """A reading as lines of text."""
    best = [f"{name} {score:.2f}" for name, score in list(reading.scores.items())[:_LANGUAGES] if score > 0]
    lines = aligned([
        ["language", reading.language or "–", f"firings per feature: {', '.join(best) or 'none'}"],
        ["fastText", reading.fasttext[0], f"probability: {reading.fasttext[1]:.2f}"],
    ])  # fmt: skip
    rows = [["token", "features that fire (layer/unit, share of the largest activation)"]]
    for piece, fires in zip(reading.pieces, reading.fires, strict=True):
        named = [f"{'+'.join(reader.features[number].languages)} {reader.features[number].label} {share:.2f}"
                 for number, share in fires[:_FEATURES]]  # fmt: skip
        more = [f"and {len(fires) - _FEATURES} more"] if len(fires) > _FEATURES else []
        rows.append([piece.strip() or repr(piece), ", ".join(named + more)])
    cut = (
        [f"The text is cut at {reader.params.corpus.max_tokens} tokens (corpus.max_tokens)."]
        if reading.left_out
        else []
    )
    return "\n".join([*lines, "", *aligned(rows), *cut])
