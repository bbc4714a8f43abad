"""The loop's clock; whole runs are in test_train.py."""

from __future__ import annotations

import pytest

from fastgpt.train import loop


def test_the_clock_counts_steps_and_no_pauses(monkeypatch: pytest.MonkeyPatch):
    now = 100.0
    monkeypatch.setattr(loop.time, "perf_counter", lambda: now)
    clock = loop.StepClock()
    now, clock.steps = 106.0, 3
    with clock.paused():
        now = 1000.0
    assert clock.lap() == 2.0
    now, clock.steps = 1005.0, 1
    assert clock.lap() == 5.0, "a lap begins where the one before ended"
    now = 1006.0
    assert clock.elapsed == 12.0
