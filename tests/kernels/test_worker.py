"""A worker answers, is killed when it takes too long, and ends when its owner does."""

import os
import signal
import subprocess
import sys
import time

import pytest

from fastgpt_kernels.worker import TaskFailed, Worker

OWNER = """
from tests.kernels.test_worker import answer
from fastgpt_kernels.worker import Worker
worker = Worker(answer, "pid")
print(worker.ask(0.0, timeout=60), flush=True)
worker.ask(600.0, timeout=600)
"""


def answer(what, seconds):
    time.sleep(seconds)
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    return os.getpid() if what == "pid" else 1 / (what != "raise")


def test_an_answer_and_its_failures():
    worker = Worker(answer, "pid")
    first = worker.ask(0.0, timeout=60)
    assert worker.ask(0.0, timeout=60) == first, "the second task had another process"
    with pytest.raises(TaskFailed, match="took over 0 s"):
        worker.ask(600.0, timeout=0.2)
    assert worker.ask(0.0, timeout=60) != first, "the one that took too long still answers"
    worker.close()
    for what, message in (("raise", "ZeroDivisionError: "), ("die", r"\(SIGKILL\)")):
        worker = Worker(answer, what)
        with pytest.raises(TaskFailed, match=message):
            worker.ask(0.0, timeout=60)
        worker.close()


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_it_ends_with_its_owner(how):
    """A killed benchmark leaves nothing that trains on, and no traceback."""
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert owner.stdout
    assert owner.stdout.readline().strip().isdigit()
    owner.send_signal(how)
    # The worker has these pipes too: they end once both have ended.
    assert owner.communicate(timeout=60) == ("", "")
    assert owner.returncode == -how
