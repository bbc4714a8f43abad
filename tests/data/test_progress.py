import io
import sys

from fastgpt.data import progress as module
from fastgpt.data.progress import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_sees_a_bar(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress("tokenizing", 2_000_000, 500_000) as advance:
        advance(1_500_000)
    shown = sys.stderr.getvalue()
    assert "tokenizing" in shown and "2.0/2.0 MB" in shown


def test_an_unknown_total_is_no_trouble(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress("tokenizing", None) as advance:
        advance(1)


def test_a_pipe_sees_nothing(capsys):
    with progress("tokenizing", 10) as advance:
        advance(10)
    assert capsys.readouterr() == ("", "")


def test_a_pipe_sees_a_line_every_ten_seconds(monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr(module, "_clock", lambda: now)
    with progress("tokenizing", 100_000_000, 10_000_000) as advance:
        for second in range(1, 31):
            now = second * 1.0
            advance(1_500_000)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "tokenizing: 25 MB of 100 MB, 25 %, 1.5 MB/s",
        "tokenizing: 40 MB of 100 MB, 40 %, 1.5 MB/s",
        "tokenizing: 55 MB of 100 MB, 55 %, 1.5 MB/s",
    ]


def test_other_units_and_no_total(monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr(module, "_clock", lambda: now)
    with progress("questions", None, unit="questions") as advance:
        now = 20.0
        advance(500)
    assert capsys.readouterr().err == "questions: 500 questions, 25 questions/s\n"
