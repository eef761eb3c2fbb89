"""How far a long piece of work is: a line from time to time."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import timedelta

SECONDS_BETWEEN_LINES = 10


class Progress:
    """Prints ``samples 500/1,000  images/s 87  left 0:00:06``, at most every 10 seconds, and when all is done.

    >>> progress = Progress("samples", 1000)
    >>> progress.add(1000)
      samples 1,000/1,000  images/s ...  left 0:00:00

    Args:
        what: Is counted.
        count: How many there are, on all ranks.
        ranks: How many there are; each is taken to be as far as this one.
        silent: Whether another rank prints.
    """

    def __init__(self, what: str, count: int, ranks: int = 1, silent: bool = False) -> None:
        self.what, self.count, self.ranks, self.silent, self.done = what, count, ranks, silent, 0
        self.began = self.printed = time.perf_counter()

    def add(self, count: int) -> None:
        """Count what this rank has done since."""
        if self.silent or self.done == self.count:
            return
        self.done = min(self.done + count * self.ranks, self.count)
        now = time.perf_counter()
        if self.done == self.count or now - self.printed > SECONDS_BETWEEN_LINES:
            self.printed, rate = now, self.done / (now - self.began)
            print_line({self.what: f"{self.done:,}/{self.count:,}", **pace(rate, (self.count - self.done) / rate)})


def pace(rate: float, left: float | None) -> dict[str, str]:
    """Return the words for images per second and, where there is an end, the seconds left."""
    words = {"images/s": f"{rate:.0f}" if rate >= 10 else f"{rate:.1f}"}
    return words if left is None else {**words, "left": str(timedelta(seconds=round(left)))}


def print_line(words: Mapping[str, object]) -> None:
    """Print names and values in one line, at once."""
    print("  " + "  ".join(f"{name} {value}" for name, value in words.items()), flush=True)
