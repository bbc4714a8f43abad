"""An object in a process of its own, where it may fail, hang or crash in place of its owner.

`Child("module:Class", arguments)` makes it there and `ask("method", ...)` calls it; what goes to
and fro is JSON, a line each way. If there is no answer in time the process is killed, and the next
`ask` starts another one. Its output goes nowhere, and it ends with its owner.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from fastgpt_kernels.telling import why

START_S = 120.0


class Failed(Exception):
    """A candidate is wrong, raised, took too long or ended its process: the message says which."""


class Spent(Exception):
    """The budget ended before there was an answer: nothing is known of the candidate."""


class Child:
    """`ask` raises Failed if the method raised, took too long, or the process ended."""

    def __init__(
        self,
        make: str,
        arguments: Mapping[str, Any],
        environment: Mapping[str, str] | None = None,
    ):
        self.request = {"make": make, "arguments": dict(arguments)}
        self.environment = {**os.environ, **(environment or {})}
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._lock = threading.Lock()

    def ask_within(self, left: Callable[[], float], method: str, *args: Any, timeout: float) -> Any:
        """As `ask`, for at most what is left of a budget; Spent if that ends first."""
        try:
            if self._process is None:
                remaining = left()
                if remaining <= 0:
                    raise Spent
                self._start(max(0.1, min(START_S, remaining)))
            return self.ask(method, *args, timeout=max(0.1, min(timeout, left())))
        except Failed:
            if left() <= 0:
                raise Spent from None
            raise

    def ask(self, method: str, *args: Any, timeout: float) -> Any:
        """What the method returns, within some seconds; starting is not counted."""
        with self._lock:
            if self._process is None:
                self._start(START_S)
            self._send([method, args])
            return self._answer(timeout)

    def _start(self, seconds: float) -> None:
        start = "import json, sys; sys.path[:] = json.loads(sys.stdin.readline()); "
        start += f"from {__name__} import serve; serve()"
        try:
            process = subprocess.Popen(
                [sys.executable, "-c", start], text=True, env=self.environment,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl+C is the owner's, which then kills it
            )  # fmt: skip
        except OSError as e:
            raise Failed(f"its process cannot start ({e.strerror or e})") from e
        lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._process, self._lines = process, lines

        def read() -> None:
            assert process.stdout
            for line in process.stdout:
                lines.put(line)
            lines.put("")

        threading.Thread(target=read, daemon=True).start()
        self._send([*map(str, sys.path)])
        self._send(self.request)
        self._answer(seconds)

    def _send(self, message: Any) -> None:
        assert self._process and self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # its end is noticed when it does not answer
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()

    def _answer(self, seconds: float) -> Any:
        process = self._process
        assert process
        try:
            line = self._lines.get(timeout=seconds)
        except queue.Empty:
            self.close()
            raise Failed(f"does not answer within {seconds:g} s") from None
        if not line:
            how = "closes its output"
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(10)
                how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
                how = f"ends its process ({how})"
            self.close()
            raise Failed(how)
        answer = json.loads(line)
        if "failed" in answer:
            if answer["lost"]:
                self.close()
            raise Failed(answer["failed"])
        return answer["is"]

    def close(self) -> None:
        """Kill the process and what it began; the next `ask` starts another."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        assert process.stdin
        with contextlib.suppress(OSError):
            process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)  # a driver may keep it longer: that is not waited for


# --- in the child --------------------------------------------------------------------------------


def serve() -> None:
    """Make the object, then call it for each line, until the owner is gone."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what compilers and kernels print is no answer
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            lines.put(line)
        os._exit(1)  # however busy the object is

    request = json.loads(sys.stdin.readline())
    threading.Thread(target=read, daemon=True).start()

    def answer(**said: Any) -> None:
        print(json.dumps(said), file=answers)

    def attempt(call: Callable[[], Any]) -> None:
        try:
            answer(**{"is": call()})
        except Exception as e:  # whatever it is, it is the answer
            answer(failed=str(e) if isinstance(e, Failed) else why(e), lost=_lost())

    module, _, name = request["make"].partition(":")
    thing: Any = None

    def make() -> None:
        nonlocal thing
        thing = getattr(importlib.import_module(module), name)(**request["arguments"])

    attempt(make)
    if thing is None:
        os._exit(1)
    while True:
        method, args = json.loads(lines.get())
        attempt(partial(_call, thing, method, args))


def _call(thing: Any, method: str, args: list[Any]) -> Any:
    return getattr(thing, method)(*args)


def _lost() -> bool:
    """Whether the GPU does not compute any more: after an illegal access nothing does here."""
    torch = sys.modules.get("torch")  # it is not loaded for this
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
        return torch.zeros((), device="cuda").item() != 0
    except Exception:
        return True
