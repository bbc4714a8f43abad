"""Long work that says what it is: nothing is silent for more than five seconds."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EVERY_S = 5.0


def _print(line: str) -> None:
    print(line, flush=True)


@contextmanager
def telling(
    what: str, say: Callable[[str], object] = _print, every: float = EVERY_S
) -> Iterator[Callable[[], float]]:
    """Within, a line every few seconds: "compiling: 10 s so far".

    Gives a function that returns the seconds since it began, for what is said at the end.
    """
    began, over = time.monotonic(), threading.Event()

    def elapsed() -> float:
        return time.monotonic() - began

    def beat() -> None:
        while not over.wait(every):
            say(f"{what}: {elapsed():.0f} s so far")

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield elapsed
    finally:
        over.set()
        thread.join()
