"""Number of tries, how a single one is repeated, and the table of what held.

CHAOS=3000 asks for 3,000 tries in all (`make chaos`); without it there are few. CHAOS_TRY=k makes
try k alone of each kind. A try depends on nothing but its kind and its number.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import os
import random
import re
import shutil
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch

TRIES, ONLY = int(os.environ.get("CHAOS", "120")), os.environ.get("CHAOS_TRY")
CHUNK = 40
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL)
BEGAN = time.monotonic()
Try = Callable[[str, int], AbstractContextManager[random.Random]]


def cases(share: float, *kinds: Iterable) -> list:
    """Returns test parameters (kind..., range of tries) that share all tries among processes."""
    combined = [*itertools.product(*kinds)]
    total = max(1, round(TRIES * share / len(combined)))
    tries = range(total) if ONLY is None else range(int(ONLY), int(ONLY) + 1)
    parts = [tries[at : at + CHUNK] for at in range(0, len(tries), CHUNK)]
    out = []
    for kind, part in itertools.product(combined, parts):
        names = [getattr(k, "__name__", getattr(k, "name", str(k))) for k in kind]
        out.append(pytest.param(*kind, part, id="-".join([*names, str(part[0])])))
    return out


@pytest.fixture(scope="session", autouse=True)
def ready_to_fork() -> None:
    """Loads what forked children need, and sets one thread, since a pool of threads hangs there."""
    for module in ("torch._dynamo", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        importlib.import_module(module)
    torch.set_num_threads(1)


@pytest.fixture
def one_try(request, record_property, tmp_path: Path) -> Try:
    """Returns a context of one try, with its random numbers, in a copy of tmp_path/template."""

    @contextlib.contextmanager
    def context(what: str, k: int) -> Iterator[random.Random]:
        case = re.sub(r"\d+\]$", f"{k}]", request.node.nodeid)
        home, began = tmp_path / "try", time.monotonic()
        template = tmp_path / "template"
        shutil.copytree(template, home, symlinks=True) if template.exists() else home.mkdir()
        try:
            with contextlib.chdir(home):
                yield random.Random(case.partition("::")[2])
        except BaseException as e:
            e.add_note(f"repeat it: CHAOS_TRY={k} python -m pytest -n 0 {case!r}; files: {home}")
            raise
        shutil.rmtree(home)
        record_property("held", (what, time.monotonic() - began))

    return context


def pytest_terminal_summary(terminalreporter) -> None:
    held: dict[str, list[float]] = defaultdict(list)
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", "") == "call":
                for name, value in report.user_properties:
                    if name == "held":
                        held[value[0]].append(value[1])
    failed = [r.nodeid for r in terminalreporter.stats.get("failed", []) if "chaos" in r.nodeid]
    if not held:
        return
    terminalreporter.section("what was tried, held, and took per try")
    for what, seconds in sorted(held.items()):
        mean = 1000 * sum(seconds) / len(seconds)
        terminalreporter.write_line(f"{len(seconds):6,}  {mean:6.0f} ms  {what}")
    count, took = sum(map(len, held.values())), time.monotonic() - BEGAN
    terminalreporter.write_line(f"{count:6,} in all, {took:.0f} s; failures: {len(failed)}")
