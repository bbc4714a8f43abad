"""An error in one line."""

import ast
import subprocess

import pytest
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources

from fastgpt_kernels.progress import describe_error

SOURCE = "def kernel(x):\n    y = tl.dott(x, x)\n"
NODE = ast.parse(SOURCE).body[0].body[0]  # type: ignore[attr-defined]
INDUCTOR = "backend='inductor' raised:\nKeyError: 'x'\n\nSet TORCHDYNAMO"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError("out of memory\nmore"), "out of memory"),
        (RuntimeError(INDUCTOR), "KeyError: 'x'"),
        (RuntimeError("at 3:4:\n  y = x +\nunexpected end"), "unexpected end"),
        (KeyError("x"), "KeyError: 'x'"),
        (OSError(), "OSError"),
        (ValueError("x" * 200), "x" * 100 + " ... " + "x" * 55),
        (OutOfResources(294912, 232448, "shared memory"), "OutOfResources: out of resource: sh"),
        (CompilationError(SOURCE, NODE, "no function dott"), "CompilationError: no function dott"),
        (subprocess.CalledProcessError(1, ["gcc", "-Wl"] * 99), "CalledProcessError: Command '["),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_in_one_line(error: Exception, line: str) -> None:
    found = describe_error(error)
    assert found.startswith(line) and "\n" not in found and len(found) <= 160
