"""A signal is a wish until the second Ctrl+C."""

from __future__ import annotations

import os
import signal

import pytest

from fastgpt.train.loop import StopRequest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_first_signal_is_noted(number):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert stop.signal is None
        os.kill(os.getpid(), number)
        assert stop.signal == number
        os.kill(os.getpid(), signal.SIGTERM)  # schedulers repeat themselves
        assert stop.signal is not None
    assert signal.getsignal(number) is before


def test_second_interrupt_ends_at_once():
    with pytest.raises(KeyboardInterrupt), StopRequest():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
