"""Times and signals of the loop; whole runs are in test_main.py."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from fastgpt import cli
from fastgpt.train import loop, metrics
from fastgpt.train.loop import Loop, StopRequest
from fastgpt.train.trainer import Trainer
from tests import runs


def test_evaluations_take_no_time_of_the_steps(tmp_path: Path, monkeypatch):
    """By a clock on which a step takes a second and an evaluation a thousand."""
    now, step, evaluate = 100.0, Trainer.step, Loop.evaluate

    def lasts(seconds: float, function):
        def call(*args):
            nonlocal now
            now += seconds
            return function(*args)

        return call

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loop.time, "perf_counter", lambda: now)
    monkeypatch.setattr(Trainer, "step", lasts(1.0, step))
    monkeypatch.setattr(Loop, "evaluate", lasts(1000.0, evaluate))
    args = (*runs.TINY, f"--input={runs.write_text(tmp_path)}", "--out_dir=out", "--max_iters=7")
    with pytest.raises(SystemExit):
        cli.main(["train", *args, "--eval_interval=2", "--log_interval=3"])
    lines = metrics.read(Path("out/metrics.jsonl"))
    assert [r["time_ms"] for r in lines if r["kind"] == "train"] == [1000.0, 1000.0, 1000.0]


def test_a_run_stopped_in_its_last_evaluation_is_finished_by_the_same_command(
    tmp_path: Path, monkeypatch
):
    evaluate = Loop.evaluate

    def stopped(self: Loop, step: int) -> bool:
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(self, step)

    monkeypatch.chdir(tmp_path)
    args = (*runs.TINY, f"--input={runs.write_text(tmp_path)}", "--out_dir=out", "--max_iters=4")
    args += ("--eval_interval=3", "--init_from=auto")
    for function, code, evaluated in ((stopped, 143, [0, 3]), (evaluate, 0, [0, 3, 4])):
        monkeypatch.setattr(Loop, "evaluate", function)
        with pytest.raises(SystemExit) as e:
            cli.main(["train", *args])
        assert (e.value.code or 0) == code
        assert [r["step"] for r in runs.records(Path("out"), "eval")] == evaluated


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
    """nohup ignores it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.received is None
    finally:
        signal.signal(signal.SIGHUP, before)
