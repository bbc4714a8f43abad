"""First contact with kernels on a device, in a process that may hang or die in place of the run.

The parent sends what to check as a line of JSON, the child answers with a line for each task. If it
is silent for too long, or ends, the op that it was at is at fault; the others are asked of a new
process. Kernels that were compiled there are found in Triton's cache by the run.
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from fastgpt_kernels import launch
from fastgpt_kernels.registry import OpSpec, Sizes, spec, specs
from fastgpt_kernels.selfcheck import compile_ahead, disagreement
from fastgpt_kernels.telling import why


@dataclass(frozen=True)
class Task:
    """One implementation of an op, by names, and what it is to be checked for.

    function  "module:name" in place of the record's own implementation
    """

    op: str
    implementation: str
    device: str
    dtype: str
    sizes: Sizes
    function: str = ""
    deterministic: bool = False

    @classmethod
    def of(
        cls, op: OpSpec, name: str, device: torch.device, dtype: torch.dtype, sizes: Sizes
    ) -> Task:
        function = op.implementations[name].function
        implementation = spec(op.name).implementations.get(name)
        known = implementation is not None and implementation.function is function
        path = "" if known else f"{function.__module__}:{function.__qualname__}"
        deterministic = torch.are_deterministic_algorithms_enabled()
        dtype_name = str(dtype).removeprefix("torch.")
        return cls(op.name, name, str(device), dtype_name, sizes, path, deterministic)

    def check(self) -> tuple[OpSpec, str, torch.dtype, Sizes]:
        """The way back: op, implementation, dtype, sizes."""
        op = spec(self.op)
        if self.function:
            module, _, name = self.function.partition(":")
            function = getattr(importlib.import_module(module), name)
            found = replace(op.implementations[self.implementation], function=function)
            op = replace(op, implementations={**op.implementations, self.implementation: found})
        return op, self.implementation, getattr(torch, self.dtype), self.sizes


@dataclass(frozen=True)
class Limits:
    """Seconds: until a process is ready, for compiling all kernels ahead, and for an op's check,
    which compiles them if that had failed."""

    start: float = 120.0
    compile: float = 120.0
    op: float = 120.0


LIMITS = Limits()


class Silent(Exception):
    """The process gave no answer; the message says whether it took too long or ended, and how."""


# What was found in this process, for as long as it lives: like functools.cache, but many tasks are
# answered together.
_FOUND: dict[Task, str] = {}


def first_contact(tasks: Sequence[Task], limits: Limits = LIMITS) -> list[str]:
    """What is wrong with each of the tasks; empty for one that agrees."""
    asked = [task for task in tasks if task not in _FOUND]
    ahead = launch.HAS_TRITON and all(task.device.startswith("cuda") for task in tasks)
    while waiting := [task for task in asked if task not in _FOUND]:
        try:
            _FOUND.update(_ask(waiting, ahead, limits))
        except OSError as e:
            _FOUND.update(dict.fromkeys(waiting, f"its check cannot start ({why(e)})"))
        ahead = False
    return [_FOUND[task] for task in tasks]


def _ask(tasks: Sequence[Task], ahead: bool, limits: Limits) -> Iterator[tuple[Task, str]]:
    """What one process says, until it ends: of each task, but of none if it ends while it compiles
    ahead, for then nobody knows which is at fault."""
    with _process({"tasks": [asdict(task) for task in tasks], "ahead": ahead}) as answer:
        try:
            wrong = answer(limits.start)["wrong"]
        except Silent as e:
            wrong = f"its check {e}"
        if wrong:
            yield from ((task, wrong) for task in tasks)
            return
        try:
            if ahead:
                answer(limits.compile)
        except Silent:
            return
        for task in tasks:
            try:
                said = answer(limits.op)
            except Silent as e:
                yield task, str(e)
                return
            yield task, said["wrong"]
            if said["lost"]:
                return


@contextlib.contextmanager
def _process(request: dict[str, Any]) -> Iterator[Callable[[float], dict[str, Any]]]:
    """A child with its request; what comes is asked for its next answer within some seconds."""
    start = "import json, sys; sys.path[:] = json.loads(sys.stdin.readline()); "
    start += f"from {__name__} import serve; serve()"
    child = subprocess.Popen(
        [sys.executable, "-c", start], text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl+C is the parent's, which then kills all that the child began
    )  # fmt: skip
    assert child.stdin and child.stdout
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read(stream: Any) -> None:
        for line in stream:
            lines.put(line)
        lines.put("")

    reader = threading.Thread(target=read, args=(child.stdout,), daemon=True)
    reader.start()

    def answer(seconds: float) -> dict[str, Any]:
        try:
            line = lines.get(timeout=seconds)
        except queue.Empty:
            raise Silent(f"does not answer within {seconds:g} s") from None
        if line:
            return json.loads(line)
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = child.wait(10)
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            raise Silent(f"ends its process ({how})")
        raise Silent("closes its output")

    try:
        with contextlib.suppress(BrokenPipeError):
            child.stdin.write(f"{json.dumps([*map(str, sys.path)])}\n{json.dumps(request)}\n")
            child.stdin.flush()
        yield answer
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        with contextlib.suppress(BrokenPipeError):
            child.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(10)  # a driver may keep it longer: that is not waited for
            reader.join(10)


# --- in the child --------------------------------------------------------------------------------


def serve() -> None:
    """Answer a request: when ready, when all is compiled (if that is asked for), for each task."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what compilers and kernels print is no answer
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def answer(**said: Any) -> None:
        print(json.dumps(said), file=answers)

    tasks = [Task(**{**task, "sizes": Sizes(**task["sizes"])}) for task in request["tasks"]]
    device = torch.device(tasks[0].device)
    try:
        specs()  # loads every room: from here on the time is the op's
        if device.index is not None:
            torch.cuda.set_device(device)
        if tasks[0].deterministic:
            torch.use_deterministic_algorithms(True, warn_only=True)
        torch.zeros((), device=device).item()
    except Exception as e:
        answer(wrong=f"its check cannot start ({why(e)})")
        os._exit(1)
    answer(wrong="")
    if request["ahead"]:
        with contextlib.suppress(Exception):
            compile_ahead([task.check() for task in tasks], device, _threads())
        answer(wrong="")
    for task in tasks:
        try:
            op, name, dtype, sizes = task.check()
            wrong = disagreement(op, name, device, dtype, sizes)
        except Exception as e:
            wrong = f"cannot be checked here ({why(e)})"
        lost = bool(wrong) and not _alive(device)
        answer(wrong=wrong, lost=lost)
        if lost:
            break
    os._exit(0)


def _threads() -> int:
    """Cores for this rank: torchrun's others compile at the same time."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _alive(device: torch.device) -> bool:
    """Whether the device still computes: after an illegal access nothing does in this process."""
    try:
        return torch.zeros((), device=device).item() == 0
    except Exception:
        return False


def _end_with_parent() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)
