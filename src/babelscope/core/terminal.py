"""Text in columns for a terminal, in which a character may be two columns wide or none."""

import unicodedata
from collections.abc import Collection, Sequence


def width(text: str) -> int:
    """The number of columns that a terminal needs for `text`."""
    wide = (unicodedata.east_asian_width(character) in "WF" for character in text)
    drawn_over = (unicodedata.category(character) in ("Mn", "Me", "Cf") for character in text)
    return sum(0 if over else 1 + two for over, two in zip(drawn_over, wide, strict=True))


def aligned(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> list[str]:
    """The rows as lines with aligned columns; the columns `right` are aligned to the right."""
    clean = [["".join(c if c.isprintable() else " " for c in cell) for cell in row] for row in rows]
    widths = [max(map(width, column)) for column in zip(*clean, strict=True)]
    lines = []
    for row in clean:
        cells = []
        for number, (cell, most) in enumerate(zip(row, widths, strict=True)):
            space = " " * (most - width(cell))
            cells.append(space + cell if number in right else cell + space)
        lines.append("  ".join(cells).rstrip())
    return lines
