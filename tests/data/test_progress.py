import io
import sys

import pytest

from fastgpt.data import progress as module
from fastgpt.data.progress import progress


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module, "_clock", lambda: now[0])
    return now


def test_a_pipe_sees_a_line_every_ten_seconds(clock, capsys):
    with progress("tokenizing", 100_000_000, 10_000_000) as advance:
        for second in range(1, 31):
            clock[0] = second * 1.0
            advance(1_500_000)
    assert capsys.readouterr().err.splitlines() == [
        "tokenizing: 25 MB of 100 MB, 25 %, 1.5 MB/s, 50 s left",
        "tokenizing: 40 MB of 100 MB, 40 %, 1.5 MB/s, 40 s left",
        "tokenizing: 55 MB of 100 MB, 55 %, 1.5 MB/s, 30 s left",
    ]
    with progress("questions", None, unit="questions") as advance:
        clock[0] = 50.0
        advance(500)
    assert capsys.readouterr().err == "questions: 500 questions, 25 questions/s\n"
    with progress("quick", 10) as advance:
        advance(10)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_sees_one_line_that_changes_and_goes(clock, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress("tokenizing", 2_000_000) as advance:
        for clock[0] in (0.1, 0.3, 0.6):
            advance(100_000)
    first, second = "10 %, 667 kB/s, 3 s left", "15 %, 500 kB/s, 3 s left"
    shown = [f"tokenizing: 200 kB of 2 MB, {first}", f"tokenizing: 300 kB of 2 MB, {second}"]
    assert terminal.getvalue() == "".join(f"\r\x1b[K{line}" for line in (*shown, ""))
