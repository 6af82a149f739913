"""Progress of long work: a bar on a terminal, plain lines with rate and remaining time in a log or in CI."""

import io
import logging
import os
import sys
from types import TracebackType
from typing import Any

from tqdm import tqdm

log = logging.getLogger(__name__)

# Seconds until the first line; shorter work prints none.
_FIRST = 1.0
tqdm.monitor_interval = 0  # no thread that redraws bars
_LINE = "{desc}: {n_fmt} of {total_fmt}{unit} in {elapsed}, {rate_fmt}, {remaining} left"


class _LogLines(io.StringIO):
    """tqdm's output if there is no terminal: each state of the bar becomes one line of the log."""

    def write(self, text: str) -> int:
        if line := text.strip():
            log.info("%s", line)
        return len(text)


class Progress:
    """Counts units of work towards `total` and shows rate and remaining time.

    Without a terminal, or if the environment variable `CI` is set, there are lines instead of a bar: the first after a
    second, then one every 10 seconds (in CI every 60), and one at the end.

    Parameters
    ----------
    name: what is being done, e.g. "extract".
    total: units of work in all.
    unit: name of one unit, e.g. "tokens".
    every: seconds between two lines; None: 10, in CI 60.
    """

    def __init__(self, name: str, total: int, unit: str, every: float | None = None) -> None:
        in_ci = bool(os.environ.get("CI"))
        self.every = (60.0 if in_ci else 10.0) if every is None else every
        self._is_bar = sys.stderr.isatty() and not in_ci
        lines: dict[str, Any] = {
            "file": _LogLines(), "bar_format": _LINE, "delay": min(_FIRST, self.every) or 1e-9,
            "mininterval": min(_FIRST, self.every), "maxinterval": float("inf"), "miniters": 1,
        }  # fmt: skip
        self._tqdm = tqdm(
            total=total, desc=name, unit=f" {unit}", unit_scale=True, smoothing=0, disable=False,
            **({} if self._is_bar else lines),
        )  # fmt: skip

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if not self._is_bar:
            took = self._tqdm.format_dict["elapsed"]
            self._tqdm.delay = 0 if kind is None and took >= _FIRST and self._tqdm.n else float("inf")
        self._tqdm.close()

    def skip(self, count: int) -> None:
        """Leave out `count` units that an interrupted run has done: they do not count in the rate."""
        self._tqdm.total -= count

    def update(self, count: int) -> None:
        """Add `count` units that have just been done."""
        if self._tqdm.n + count < self._tqdm.total:
            if self._tqdm.update(count) and not self._is_bar:
                self._tqdm.mininterval = self.every
        else:
            self._tqdm.n += count  # shown by the last line
