"""Running the command line as real processes, forked from a server that has imported torch once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "fastgpt.train.main",
        "fastgpt.inference.sample",
        "torch._dynamo",  # what making an optimizer imports
        "matplotlib.figure",
        "matplotlib.backends.backend_agg",
    ]
)


def _child(
    args: list[str], cwd: str, out: str, limits: dict[int, int], environment: dict[str, str]
) -> None:
    import resource

    os.chdir(cwd)
    os.environ.update(environment)
    fd = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    sys.stdout = open(1, "w", closefd=False, buffering=1)  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False, buffering=1)  # noqa: SIM115
    for number in (signal.SIGINT, signal.SIGTERM):
        default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, default)
    for what, value in limits.items():
        resource.setrlimit(what, (value, value))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write past the limit fails with EFBIG
    import torch

    from fastgpt.cli import main

    torch.set_num_threads(1)
    main(args)


class Command:
    """A `fastgpt` command in a process of its own, stdout and stderr together in a file."""

    def __init__(
        self,
        cwd: Path,
        *args: str,
        limits: dict[int, int] | None = None,
        environment: dict[str, str] | None = None,
    ):
        self._out = cwd / f".output-{time.monotonic_ns()}"
        self.process: BaseProcess = _context.Process(
            target=_child,
            args=(list(args), str(cwd), str(self._out), limits or {}, environment or {}),
        )
        self.process.start()

    @property
    def output(self) -> str:
        return self._out.read_text() if self._out.exists() else ""

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        if self.process.pid is not None and self.process.is_alive():
            os.kill(self.process.pid, number)

    def wait(self, timeout: float = 400.0) -> int:
        """The exit code (negative: the signal that ended it)."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise TimeoutError(f"no end after {timeout} s; said:\n{self.output}")
        return self.process.exitcode

    def wait_until(self, condition: Callable[[], bool], timeout: float = 300.0) -> None:
        end = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > end or self.process.exitcode is not None:
                raise TimeoutError(f"condition not met; said:\n{self.output}")
            time.sleep(0.005)


def fastgpt(
    cwd: Path,
    *args: str,
    code: int = 0,
    limits: dict[int, int] | None = None,
    environment: dict[str, str] | None = None,
) -> str:
    """Run a command to its end; its output. Fails the test where the exit code is another."""
    command = Command(cwd, *args, limits=limits, environment=environment)
    got = command.wait()
    assert got == code, f"exit code {got}, expected {code}; said:\n{command.output}"
    return command.output
