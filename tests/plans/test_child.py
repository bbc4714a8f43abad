"""A process that may fail in place of its owner; real ones here, one for all faults."""

from __future__ import annotations

import os

import pytest

from fastgpt_kernels.plans.child import Child, Failed, Spent

MAKE = "tests.plans.faulty:Faulty"


def test_a_child_answers_fails_hangs_dies_and_starts_again():
    child = Child(MAKE, {"name": "x"})
    try:
        assert child.ask("hello", "you", timeout=60) == ["x", "you", 1]
        assert child.ask("hello", "you", timeout=60) == ["x", "you", 2]
        with pytest.raises(Failed, match="^out of resource$"):
            child.ask("raises", timeout=60)
        pid = child.ask("pid", timeout=60)
        with pytest.raises(Failed, match="AttributeError"):
            child.ask("nothing", timeout=60)
        with pytest.raises(Failed, match=r"does not answer within 0\.2 s"):
            child.ask("hangs", timeout=0.2)
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)  # it was ended and waited for
        # Another one: it has not been called before.
        assert child.ask("hello", "again", timeout=60) == ["x", "again", 1]
        with pytest.raises(Failed, match=r"ends its process \(exit code 3\)"):
            child.ask("dies", timeout=60)
        left = iter([60.0, 0.1, 0.0])
        with pytest.raises(Spent):
            child.ask_within(lambda: next(left), "hangs", timeout=60)
        left = iter([0.0])
        with pytest.raises(Spent):  # no time to start it either
            child.ask_within(lambda: next(left), "hello", "you", timeout=60)
    finally:
        child.close()
    child.close()


def test_what_cannot_be_made_is_said():
    with pytest.raises(Failed, match="no such thing"):
        Child(MAKE, {"name": "cannot be made"}).ask("hello", "you", timeout=60)
