"""A kernel may raise, hang, die or be wrong: the run goes on with eager and says why in one line.

The children here are real ones; without a GPU the kernels in them run in Triton's interpreter.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch

from fastgpt.errors import UserError
from fastgpt.model import contact, ops
from fastgpt.model.contact import Limits, Task, first_contact
from fastgpt.model.ops import Wish, choose_all
from fastgpt_kernels.registry import Implementation, Sizes, spec
from tests.model import bad_kernels
from tests.model.test_ops import CPU, interpreted

SMALL = Sizes(1, 20, 1, 32, 61, 128, dropout=0.3, bias=False, gelu="erf")
QUICK = Limits(start=120, compile=120, op=10)


@pytest.fixture(autouse=True)
def nothing_is_known(monkeypatch):
    monkeypatch.setattr(contact, "_FOUND", {})


def with_function(function, op="bias_gelu"):
    known = spec(op)
    triton = Implementation(function)
    return replace(known, implementations={**known.implementations, "triton": triton})


def tasks(*functions):
    return [Task.of(with_function(f), "triton", CPU, torch.float32, SMALL) for f in functions]


def say(*functions, limits=QUICK):
    found = first_contact(tasks(*functions), limits)
    return {f.__name__: said for f, said in zip(functions, found, strict=True)}


def test_every_exception_is_one_line():
    b = bad_kernels
    want = {
        b.good: "",
        b.off: "is off by 0.01 here",
        b.not_a_number: "is off by nan here",
        b.too_few_results: "does not run here (The size of tensor",
        b.prints: "is off by 0.01 here",
        b.runs_out_of_resources: "does not run here (OutOfResources: out of resource: shared",
        b.fails_in_ptxas: "does not run here (PTXASError: PTXAS error: Internal Triton PTX codegen",
        b.does_not_compile: "does not run here (CompilationError: no function dott)",
        b.has_no_compiler: "does not run here (CalledProcessError: Command '['false', '-Wl",
        b.has_no_file: "does not run here (FileNotFoundError: [Errno 2] No such file or directory:",
        b.has_a_full_disk: "does not run here (OSError: [Errno 28] No space left on device)",
        b.asserts: "does not run here (AssertionError)",
        b.misses_a_key: "does not run here (KeyError: 'BLOCK_N')",
        b.misses_an_attribute: "does not run here (AttributeError: 'NoneType' object has no",
        b.misses_a_module: "does not run here (ImportError: libcuda.so.1: cannot open shared",
        b.has_no_memory: "does not run here (CUDA out of memory. Tried to allocate 2.00 GiB.)",
        b.is_not_implemented: "does not run here (MatMul of sm_75)",
        b.recurses: "does not run here (maximum recursion depth exceeded",
    }
    found = say(*want)
    for function, line in want.items():
        said = found[function.__name__]
        assert said.startswith(line) and (line or not said), (function.__name__, said)
        assert "\n" not in said and len(said) < 200
    assert "returned non-zero exit status 1." in found["has_no_compiler"]


@pytest.mark.slow
def test_a_process_that_hangs_or_dies_costs_one_op(monkeypatch):
    started = []
    process = contact._process
    monkeypatch.setattr(contact, "_process", lambda r: started.append(r) or process(r))
    b = bad_kernels
    found = say(b.good, b.hang, b.off, b.killed, b.aborts, b.loses_the_device, b.asserts)
    assert found == {
        "good": "",
        "hang": "does not answer within 10 s",
        "off": "is off by 0.01 here",
        "killed": "ends its process (SIGKILL)",
        "aborts": "ends its process (SIGABRT)",
        "loses_the_device": (
            "does not run here (CUDA error: an illegal memory access was encountered)"
        ),
        "asserts": "does not run here (AssertionError)",
    }
    assert [len(request["tasks"]) for request in started] == [7, 5, 3, 2, 1]
    assert say(b.hang, b.good) == {"hang": "does not answer within 10 s", "good": ""}
    assert len(started) == 5, "what is known was asked again"
    compilers = subprocess.run(["pgrep", "-f", "^sleep 987654"], capture_output=True)
    assert not compilers.stdout, "what the child had started was left behind"


def test_a_process_that_cannot_start(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert say(bad_kernels.good)["good"].startswith("its check cannot start (FileNotFoundError: ")
    monkeypatch.setattr(contact, "_FOUND", {})
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert say(bad_kernels.good, bad_kernels.off) == dict.fromkeys(
        ("good", "off"), "its check ends its process (exit code 1)"
    )


def test_a_device_that_is_not_there():
    (task,) = tasks(bad_kernels.good)
    (said,) = first_contact([replace(task, device="cuda:77")])
    assert said.startswith("its check cannot start ("), said


@contextlib.contextmanager
def fake_process(*answers):
    """A process that gives these answers; None: it says no more."""
    left = list(answers)

    def answer(seconds):
        if not left or left[0] is None:
            raise contact.Silent(f"does not answer within {seconds:g} s")
        return left.pop(0)

    yield answer


def test_a_compiler_that_hangs_ahead_is_found_op_by_op(monkeypatch):
    """Of many kernels that compile at once nobody knows which is at fault."""
    ready, agrees = {"wrong": ""}, {"wrong": "", "lost": False}
    b = bad_kernels
    scripts = [[ready, None], [ready, agrees, None], [ready, agrees]]
    asked = []

    def process(request):
        asked.append((request["ahead"], len(request["tasks"])))
        return fake_process(*scripts.pop(0))

    monkeypatch.setattr(contact, "_process", process)
    on_gpu = [replace(task, device="cuda") for task in tasks(b.good, b.hang, b.off)]
    assert first_contact(on_gpu, QUICK) == ["", "does not answer within 10 s", ""]
    assert asked == [(True, 3), (False, 3), (False, 1)]


@pytest.fixture
def children(monkeypatch):
    found, popen = [], subprocess.Popen

    def remember(*args, **kwargs):
        found.append(popen(*args, **kwargs))
        return found[-1]

    monkeypatch.setattr(contact.subprocess, "Popen", remember)
    return found


def test_interrupting_ends_the_child(children, monkeypatch):
    class Queue:
        def get(self, timeout):
            raise KeyboardInterrupt

        def put(self, line):
            pass

    monkeypatch.setattr(contact.queue, "SimpleQueue", Queue)
    with pytest.raises(KeyboardInterrupt):
        say(bad_kernels.good)
    assert children[0].returncode == -signal.SIGKILL


def test_a_child_ends_with_its_parent(children):
    """Even if the parent was killed: the child would keep the GPU."""
    request = {"tasks": [asdict(t) for t in tasks(bad_kernels.hang)], "ahead": False}
    with contact._process(request) as answer:
        assert answer(120) == {"wrong": ""}
        children[0].stdin.close()
        assert children[0].wait(30) == 1


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there the kernels run for real")
def test_the_kernels_themselves_in_a_child(monkeypatch):
    interpreted(monkeypatch)
    checked = ("layer_norm", "bias_gelu")
    found = [Task.of(spec(n), "triton", CPU, torch.float32, SMALL) for n in checked]
    assert first_contact(found) == [""] * len(checked)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there the kernels run for real")
def test_choices_are_made_of_what_was_found(monkeypatch):
    interpreted(monkeypatch)
    said = {"bias_gelu": "ends its process (SIGSEGV)", "layer_norm": ""}
    monkeypatch.setattr(ops, "CHECKED_ON", ("cpu",))
    monkeypatch.setattr(ops, "first_contact", lambda tasks: [said[t.op] for t in tasks])
    asked = [spec(n) for n in ("bias_gelu", "layer_norm")]

    def choose(wish):
        found = choose_all(asked, CPU, torch.float32, SMALL, wish)
        assert all(
            f is spec(n).implementations[c.implementation].function for n, (c, f) in found.items()
        )
        return [c for c, _ in found.values()]

    assert choose(Wish()) == [
        ops.Choice("bias_gelu", "eager", "triton: ends its process (SIGSEGV)"),
        ops.Choice("layer_norm", "triton", "fused kernels"),
    ]
    assert {c.implementation for c in choose(Wish("eager"))} == {"eager"}
    with pytest.raises(UserError, match=r"--op.bias_gelu=triton: ends its process \(SIGSEGV\)"):
        choose(Wish(ops={"bias_gelu": "triton"}))


def test_without_a_gpu_nobody_is_asked(monkeypatch):
    monkeypatch.setattr(contact, "_process", lambda request: pytest.fail("a process was started"))
    assert all(c.implementation == "eager" for c in ops.choose(CPU, sizes=SMALL).choices)
