"""A process that answers one task after another and is killed when one takes too long.

Compilers hang and GPUs fault; a benchmark must outlive both and name the culprit. It
ends with its owner, however that ended: nothing goes on computing that nobody waits for.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any


class TaskFailed(Exception):
    """The task raised, took too long or killed its process; the message says which."""


def _serve(connection: Connection, handle: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Answer (True, result) or (False, message) to each task until None comes."""
    threading.Thread(target=_end_with_owner, daemon=True).start()
    connection.send(None)  # the imports are done: from here on the clock is the task's own
    while (task := connection.recv()) is not None:
        try:
            answer = True, handle(*arguments, *task)
        except Exception as error:  # whatever it is, it is this task's answer
            last = (str(error).strip().splitlines() or [""])[-1]
            answer = False, f"{type(error).__name__}: {last}"
        connection.send(answer)


def _end_with_owner() -> None:
    owner = multiprocessing.parent_process()
    assert owner is not None
    wait([owner.sentinel])
    os._exit(1)


class Worker:
    """`ask(*task)` returns `handle(*arguments, *task)` from a process of its own."""

    def __init__(self, handle: Callable[..., Any], *arguments: Any) -> None:
        self._handle, self._arguments = handle, arguments
        self._context = multiprocessing.get_context("spawn")
        self._process: Any = None

    def spawn(self) -> None:
        """Start the process, without waiting for its imports: `ready` does."""
        self._connection, theirs = self._context.Pipe()
        self._process = self._context.Process(
            target=_serve, args=(theirs, self._handle, self._arguments), daemon=True
        )
        self._process.start()
        theirs.close()

    def ready(self) -> None:
        """Wait for a process that was spawned. Raises TaskFailed if it does not come up."""
        if not self._connection.poll(120):
            self.close()
            raise TaskFailed("the worker process did not start within 120 s")
        self._receive()

    def _receive(self) -> Any:
        try:
            return self._connection.recv()
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            self._process = None
            raise TaskFailed(f"killed its process (exit code {code})") from None

    def ask(self, *task: Any, timeout: float) -> Any:
        """The answer to a task; TaskFailed if it raised, died or took over `timeout` seconds."""
        if self._process is None:
            self.spawn()
            self.ready()
        self._connection.send(task)
        if not self._connection.poll(timeout):
            self.close()
            raise TaskFailed(f"took over {timeout:.0f} s")
        done, answer = self._receive()
        if not done:
            raise TaskFailed(answer)
        return answer

    def close(self) -> None:
        """Kill the process, whatever it is doing; the next `ask` starts another."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None
