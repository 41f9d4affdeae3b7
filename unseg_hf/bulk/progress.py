"""One line on how far all processes of a run are."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .manifest import read_mark
from .records import Source


class Progress:
    """Counts what every process and machine has finished, by the marks in the output's folder.

    Args:
        output: folder of the data set.
        source: whose shards are counted.
        report: gets the line; None is silent.
        every: seconds between two lines.
    """

    def __init__(self, output: Path, source: Source, report: Callable[[str], None] | None, every: float = 10.0):
        self._output, self._plans, self._report, self._every = output, source.shards, report, every
        self._marks: dict[int, dict[str, Any]] = {}
        self._current = 0  # images of this process's own shard
        self._start = self._last = time.monotonic()
        self._before = self._finished()

    def add(self) -> None:
        """Count a record of the shard that is going on."""
        self._current += 1
        if self._report is not None and time.monotonic() - self._last >= self._every:
            self._last = time.monotonic()
            self._report(self.line())

    def end_shard(self) -> None:
        self._current = 0

    def line(self) -> str:
        """Such as `120 of 1000 images (12 %), 3.9 images/s, about 4 min left`."""
        done = self._finished() + self._current
        total, exact = self._total(done)
        rate = (done - self._before) / max(time.monotonic() - self._start, 1e-9)
        of = "" if total is None else f" of {'' if exact else 'about '}{total}"
        share = "" if not total else f" ({done / total:.0%})"
        left = "" if total is None or rate == 0 else f", about {duration((total - done) / rate)} left"
        return f"{done}{of} images{share}, {rate:.1f} images/s{left}"

    def _finished(self) -> int:
        for shard in range(len(self._plans)):
            if shard not in self._marks and (mark := read_mark(self._output, shard)) is not None:
                self._marks[shard] = mark
        return sum(mark["records"] for mark in self._marks.values())

    def _total(self, done: int) -> tuple[int | None, bool]:
        """All images, and whether that is known or judged by the shards that are finished."""
        known = [plan.records for plan in self._plans]
        if None not in known:
            return sum(known), True
        if not self._marks:
            return None, False
        mean = sum(mark["records"] for mark in self._marks.values()) / len(self._marks)
        return max(round(mean * len(known)), done), False


def duration(seconds: float) -> str:
    """Such as `40 s`, `12 min`, `3.5 h`, `2.1 days`."""
    if seconds < 90:
        return f"{max(seconds, 0):.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.1f} days"
