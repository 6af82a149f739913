"""Progress of long work: a bar on a terminal, plain lines with rate and remaining time in a log or in CI."""

import logging
import os
import sys
import time
from types import TracebackType
from typing import Any

log = logging.getLogger(__name__)

# Seconds until the first line.
_FIRST = 1.0


class Progress:
    """Counts units of work towards `total` and shows rate and remaining time.

    The bar has no colour (`NO_COLOR` or not). Without a bar the first line comes after a second, and the last one says
    how long the work took; work of less than a second has none. Where the environment variable `CI` is set there is no
    bar, and a line a minute.

    Parameters
    ----------
    what: what is being done, e.g. "extract".
    total: units of work in all.
    unit: name of one unit, e.g. "tokens".
    every: seconds between two lines where there is no terminal; null: 10, in CI 60.
    """

    def __init__(self, what: str, total: int, unit: str, every: float | None = None) -> None:
        in_ci = bool(os.environ.get("CI"))
        self.what, self.total, self.unit = what, total, unit
        self.every = (60.0 if in_ci else 10.0) if every is None else every
        self.done = 0
        self._start = time.monotonic()
        self._first = min(_FIRST, self.every)
        self._due = self._start + self._first
        self._bar: Any = None
        if sys.stderr.isatty() and not in_ci:
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=what, unit=unit, unit_scale=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()
        elif kind is None and (took := time.monotonic() - self._start) >= self._first and self.done:
            log.info("%s: %d %s in %.0f s, %s %s/s", self.what, self.done, self.unit, took, self._rate(took), self.unit)

    def skip(self, count: int) -> None:
        """Take `count` units as done earlier (by a run that was interrupted): they do not count in the rate."""
        self.total -= count
        if self._bar is not None:
            self._bar.total = self.total
            self._bar.refresh()

    def update(self, count: int) -> None:
        """Add `count` units that have just been done."""
        self.done += count
        if self._bar is not None:
            self._bar.update(count)
            return
        now = time.monotonic()
        if now >= self._due and self.done < self.total:
            self._due = now + self.every
            took = now - self._start
            left = (self.total - self.done) * took / self.done if self.done else float("inf")
            log.info(
                "%s: %d of %d %s, %s %s/s, %.0f s left",
                self.what, self.done, self.total, self.unit, self._rate(took), self.unit, left,
            )  # fmt: skip

    def _rate(self, took: float) -> str:
        rate = self.done / max(took, 1e-9)
        return f"{rate:.0f}" if rate >= 10 else f"{rate:.2g}"
