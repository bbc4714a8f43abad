import io
import sys

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
