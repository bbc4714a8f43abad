"""Progress lines of long work, and errors in one line."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EVERY_S = 5.0


def print_line(line: str) -> None:
    """Prints a line at once."""
    print(line, flush=True)


@contextmanager
def progress(work: str, say: Callable[[str], object] = print_line) -> Iterator[Callable[[], float]]:
    """Prints every few seconds how long the work takes: "compiling: 10 s so far".

    Yields a function that returns the seconds since the start.
    """
    began, over = time.monotonic(), threading.Event()

    def elapsed() -> float:
        return time.monotonic() - began

    def beat() -> None:
        while not over.wait(EVERY_S):
            say(f"{work}: {elapsed():.0f} s so far")

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield elapsed
    finally:
        over.set()
        thread.join()


def describe_error(error: Exception) -> str:
    """Returns an error's message as one line of at most 160 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    if len(lines) > 1 and lines[0].endswith("raised:"):  # torch.compile, of a backend
        lines = lines[1:]
    line = lines[-1] if lines[0].startswith("at ") else lines[0]  # Triton's: source text first
    if not isinstance(error, RuntimeError | ValueError | TypeError) or not line:
        line = f"{type(error).__name__}: {line}".removesuffix(": ")
    return line if len(line) <= 160 else f"{line[:100]} ... {line[-55:]}"
