"""How many tries there are, and the table of what held.

CHAOS=3000 asks for so many in all (`make chaos`); without it there are few, for every change.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable

import pytest

TRIES = int(os.environ.get("CHAOS", "240"))
CHUNK = 40
BEGAN = time.monotonic()


def chunks(share: float) -> list[tuple[int, int]]:
    """(seed, tries) of the parts that a share of all tries is run in, for several processes."""
    total = max(1, round(TRIES * share))
    sizes = [min(CHUNK, total - at) for at in range(0, total, CHUNK)]
    return list(enumerate(sizes))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "chaos" in item.path.parts:
            item.add_marker(pytest.mark.chaos)


@pytest.fixture
def held(record_property) -> Callable[[str], None]:
    """Count one try, of what is named, that held."""
    return lambda what: record_property("held", what)


def pytest_terminal_summary(terminalreporter) -> None:
    held: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", "") == "call":
                held.update(what for name, what in report.user_properties if name == "held")
    failed = [r.nodeid for r in terminalreporter.stats.get("failed", []) if "chaos" in r.nodeid]
    if not held:
        return
    terminalreporter.section("what was tried, and held")
    for what, count in sorted(held.items()):
        terminalreporter.write_line(f"{count:6,}  {what}")
    took = f"{time.monotonic() - BEGAN:.0f} s"
    terminalreporter.write_line(f"{sum(held.values()):6,}  in all, {took}; failures: {len(failed)}")
