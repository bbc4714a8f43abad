"""The loop's clock and its signals; whole runs are in test_main.py."""

from __future__ import annotations

import os
import signal

import pytest

from fastgpt.train import loop
from fastgpt.train.loop import StopRequest


def test_the_clock_counts_no_pauses(monkeypatch: pytest.MonkeyPatch):
    now = 100.0
    monkeypatch.setattr(loop.time, "perf_counter", lambda: now)
    clock = loop.StepClock()
    now = 106.0
    with clock.paused():
        now = 1000.0
    now = 1005.0
    assert clock.elapsed() == 11.0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_first_signal_is_noted(number):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert stop.received is None
        os.kill(os.getpid(), number)
        assert stop.received == number
        os.kill(os.getpid(), signal.SIGTERM)  # schedulers repeat themselves
        assert stop.received is not None
    assert signal.getsignal(number) is before


def test_second_interrupt_ends_at_once():
    with pytest.raises(KeyboardInterrupt), StopRequest():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_an_ignored_hangup_stays_ignored():
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.received is None
    finally:
        signal.signal(signal.SIGHUP, before)
