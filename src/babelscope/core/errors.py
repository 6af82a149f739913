"""The exception whose message is written for the user."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something that the user can correct: the message says what is wrong, where (file and key), and what to do.

    `babelscope.core.stage.run` prints it without a traceback and exits with code 1.
    """


def nearest(wrong: str, allowed: Iterable[str]) -> str:
    """The end of an error message: the three `allowed` names most similar to `wrong`, or all of them if few are."""
    names = sorted(set(allowed))
    close = difflib.get_close_matches(wrong, names, n=3, cutoff=0.5)
    if len(names) <= 20:
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        return f"allowed: {', '.join(names) or 'nothing'}{hint}"
    return f"nearest: {', '.join(close or names[:3])} (of {len(names)})"
