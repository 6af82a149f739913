"""Figures as text: thousands apart, a real minus sign, a dash for what is not known."""

import math
from collections.abc import Iterable
from typing import Any

NONE = "–"
_THIN = "\u202f"


def known(value: Any) -> bool:
    """Whether it is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def mean(values: Iterable[Any]) -> float | None:
    """The mean of the known ones, or None if none is known."""
    numbers = [value for value in values if known(value)]
    return math.fsum(numbers) / len(numbers) if numbers else None


def plain(value: Any, decimals: int = 0, *, sign: bool = False) -> str:
    """`value` with fixed `decimals` and thousands apart; what rounds to zero is "0"; text stays, None is a dash."""
    if not known(value):
        return NONE if value is None or isinstance(value, float) else str(value)
    if round(float(value), decimals) == 0:
        return "0"
    text = f"{value:{'+' if sign else ''},.{decimals}f}"
    return text.replace(",", _THIN).replace("-", "\u2212")


def significant(value: Any, *, sign: bool = False, digits: int = 3) -> str:
    """`value` with so many significant digits, never in scientific notation, down to the sixth decimal."""
    if not known(value) or value == 0:
        return plain(value)
    decimals = digits - 1 - math.floor(math.log10(abs(value)))
    return plain(value, min(6, max(0, decimals)), sign=sign)


def p_value(value: Any) -> str:
    """The p of a test: two digits, and no more exact than anyone needs; never a zero."""
    return "< 0.0001" if known(value) and value < 1e-4 else significant(value, digits=2)


def percent(value: Any, decimals: int = 1) -> str:
    """A share as percent."""
    return f"{plain(100 * value, decimals)}{_THIN}%" if known(value) else NONE
