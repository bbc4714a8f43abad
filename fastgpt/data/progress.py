"""Progress on stderr, as a line redrawn on a terminal or a line every ten seconds in a pipe."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

_clock = time.monotonic


class Every:
    """A timer. `due()` is true at most once per interval, and not in the first one."""

    def __init__(self, seconds: float = 10.0) -> None:
        self._seconds, self._last = seconds, _clock()

    def due(self) -> bool:
        now = _clock()
        if now - self._last < self._seconds:
            return False
        self._last = now
        return True


@contextlib.contextmanager
def progress(what: str, total: int | None, done: int = 0, unit: str = "B") -> Iterator[Callable]:
    """Yields `advance(n)`, which counts n more of `total` units (None: unknown)."""
    begin, end = ("\r\x1b[K", "") if sys.stderr.isatty() else ("", "\n")
    every, began, at_first = Every(10.0 if end else 0.2), _clock(), done
    lock = threading.Lock()  # files are checked by several threads

    def advance(n: int) -> None:
        nonlocal done
        with lock:
            done += n
            if not every.due():
                return
            rate = (done - at_first) / (_clock() - began)
            of = f" of {_amount(total, unit)}, {100 * done / total:.0f} %" if total else ""
            line = f"{what}: {_amount(done, unit)}{of}, {_amount(rate, unit)}/s"
            if total and rate:
                left = max(0, total - done) / rate
                line += f", {left:.0f} s left" if left < 120 else f", {left / 60:.0f} min left"
            print(begin, line, sep="", end=end, file=sys.stderr, flush=True)

    try:
        yield advance
    finally:
        print(begin, end="", file=sys.stderr, flush=True)


def _amount(n: float, unit: str) -> str:
    """Returns 12.3 MB, 4.56 G tokens."""
    for scale, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if n >= scale:
            return f"{n / scale:.3g} {letter}{'' if unit == 'B' else ' '}{unit}"
    return f"{n:.0f} {unit}"
