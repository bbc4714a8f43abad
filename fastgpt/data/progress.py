"""A progress bar with rate and time left on a terminal; in a pipe a line every ten seconds."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

EVERY_S = 10.0
_clock = time.monotonic


class Every:
    """`due()` is true at most once in ten seconds, and not in the first ten."""

    def __init__(self) -> None:
        self._last = _clock()

    def due(self) -> bool:
        now = _clock()
        if now - self._last < EVERY_S:
            return False
        self._last = now
        return True


@contextlib.contextmanager
def progress(
    what: str, total: int | None, done: int = 0, unit: str = "B"
) -> Iterator[Callable[[int], None]]:
    """Yield `advance(n)`. `total` in `unit`s (None: unknown), `done` of which are there."""
    if not sys.stderr.isatty():
        yield _lines(what, total, done, unit)
        return
    from rich import progress as rp
    from rich.console import Console

    columns = (
        rp.TextColumn("{task.description}"),
        rp.BarColumn(),
        rp.DownloadColumn(),
        rp.TransferSpeedColumn(),
        rp.TimeRemainingColumn(),
    )
    with rp.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total, completed=done)
        yield lambda n: bar.advance(task, n)


def _lines(what: str, total: int | None, done: int, unit: str) -> Callable[[int], None]:
    every, began, at_first = Every(), _clock(), done
    lock = threading.Lock()  # files are checked by several threads

    def advance(n: int) -> None:
        nonlocal done
        with lock:
            done += n
            if every.due():
                rate = (done - at_first) / (_clock() - began)
                of = f" of {_amount(total, unit)}, {100 * done / total:.0f} %" if total else ""
                line = f"{what}: {_amount(done, unit)}{of}, {_amount(rate, unit)}/s"
                print(line, file=sys.stderr, flush=True)

    return advance


def _amount(n: float, unit: str) -> str:
    """12.3 MB, 4.56 G tokens."""
    for scale, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if n >= scale:
            return f"{n / scale:.3g} {letter}{'' if unit == 'B' else ' '}{unit}"
    return f"{n:.0f} {unit}"
