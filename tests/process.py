"""Running the command line as real processes, forked from a server that has imported torch once."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from fastgpt_kernels import OPS

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "fastgpt.train.main",
        "fastgpt.inference.generate",
        "torch._dynamo",  # what making an optimizer imports
        "torch.distributed.run",
        "torch.distributed.fsdp",
        "torch.nn.parallel",
        "matplotlib.figure",
        "matplotlib.backends.backend_agg",
        *dict.fromkeys(f"fastgpt_kernels.{op.module}" for op in OPS.values()),
    ]
)


def _default_signals() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _child(
    program: str,
    args: list[str],
    cwd: str,
    outputs: tuple[str, str],
    limits: dict[int, int],
    environment: dict[str, str],
) -> None:
    import resource

    os.chdir(cwd)
    os.environ.update(environment)
    for number, path in enumerate(outputs, start=1):
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(fd, number)
    sys.stdout = open(1, "w", closefd=False, buffering=1)  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False, buffering=1)  # noqa: SIM115
    _default_signals()
    for what, value in limits.items():
        resource.setrlimit(what, (value, value))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write past the limit fails with EFBIG
    import torch

    torch.set_num_threads(1)
    if program.startswith("torchrun"):
        from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler
        from torch.distributed.run import main

        if program == "torchrun":
            SubprocessHandler._popen = lambda _, args, env: _Rank(args, env)  # type: ignore
    else:
        from fastgpt.cli import main
    main(args)


class _Rank:
    """Process with the methods of subprocess.Popen that torchrun uses, forked to import nothing."""

    def __init__(self, command: Sequence[str], environment: dict[str, str]):
        fork = multiprocessing.get_context("fork")
        self._process = fork.Process(target=self._run, args=(command, environment))
        self._process.start()
        self.pid = self._process.pid

    @staticmethod
    def _run(command: Sequence[str], environment: dict[str, str]) -> None:
        os.setsid()
        os.environ.update(environment)
        _default_signals()
        sys.argv = list(command[2:])  # python -u SCRIPT ARGS...
        runpy.run_path(sys.argv[0], run_name="__main__")

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("rank", timeout or 0)
        return self._process.exitcode


class Command:
    """Process of a `fastgpt` command, with stdout and stderr together in a file.

    `program` is "torchrun" for that command, which then forks its ranks, or "torchrun, new
    interpreters" to have it start them as it does. `err` is a file for stderr alone.
    """

    def __init__(
        self,
        cwd: Path,
        *args: str,
        limits: dict[int, int] | None = None,
        environment: dict[str, str] | None = None,
        program: str = "fastgpt",
        err: Path | None = None,
    ):
        self._out = cwd / f".output-{time.monotonic_ns()}"
        outputs = str(self._out), str(err or self._out)
        self.process: BaseProcess = _context.Process(
            target=_child,
            args=(program, list(args), str(cwd), outputs, limits or {}, environment or {}),
        )
        self.process.start()

    @property
    def output(self) -> str:
        return self._out.read_text() if self._out.exists() else ""

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        if self.process.pid is not None and self.process.is_alive():
            os.kill(self.process.pid, number)

    def wait(self, timeout: float = 400.0) -> int:
        """Returns the exit code (negative: the signal that ended it)."""
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
    """Runs a command to its end and returns its output. Fails the test for another exit code."""
    command = Command(cwd, *args, limits=limits, environment=environment)
    got = command.wait()
    assert got == code, f"exit code {got}, expected {code}; said:\n{command.output}"
    return command.output
