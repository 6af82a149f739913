"""Progress of long work: a bar on a terminal, plain lines with rate and remaining time in a log."""

import logging
import sys
import time
from types import TracebackType
from typing import Any

log = logging.getLogger(__name__)


class Progress:
    """Counts units of work towards `total` and shows rate and remaining time.

    Parameters
    ----------
    what: what is being done, e.g. "extract".
    total: units of work in all.
    unit: name of one unit, e.g. "tokens".
    every: seconds between two lines where there is no terminal.
    """

    def __init__(self, what: str, total: int, unit: str, every: float = 10.0) -> None:
        self.what, self.total, self.unit, self.every = what, total, unit, every
        self.done = 0
        self._start = self._last = time.monotonic()
        self._bar: Any = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=what, unit=unit, unit_scale=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()

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
        if now - self._last >= self.every and self.done < self.total:
            self._last = now
            rate = self.done / (now - self._start)
            left = (self.total - self.done) / rate if rate else float("inf")
            log.info(
                "%s: %d of %d %s, %.0f %s/s, %.0f s left",
                self.what, self.done, self.total, self.unit, rate, self.unit, left,
            )  # fmt: skip
