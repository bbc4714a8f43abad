"""Implementations of ops that fail in every way that a kernel can; a child process imports them.

Those of Triton's own errors are made as Triton makes them.
"""

from __future__ import annotations

import os
import signal
import subprocess
from typing import Any

import torch

from fastgpt_kernels.registry import spec


def good(*args: Any, **kwargs: Any) -> Any:
    return spec("bias_gelu").eager(*args, **kwargs)


def off(*args: Any, **kwargs: Any) -> Any:
    return good(*args, **kwargs) * 1.01


def not_a_number(*args: Any, **kwargs: Any) -> Any:
    y = good(*args, **kwargs)
    return torch.where(y == y.max(), torch.nan, y)


def too_few_results(*args: Any, **kwargs: Any) -> Any:
    return good(*args, **kwargs)[:-1]


def hang(*args: Any, **kwargs: Any) -> Any:
    """In a compiler of its own, of which nothing may be left."""
    subprocess.run(["sleep", "987654"], check=True)


def killed(*args: Any, **kwargs: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def aborts(*args: Any, **kwargs: Any) -> Any:
    os.abort()


def loses_the_device(*args: Any, **kwargs: Any) -> Any:
    """As an illegal access does: from then on every call to the device fails."""

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")

    torch.zeros = fail
    fail()


def prints(*args: Any, **kwargs: Any) -> Any:
    """Prints as compilers do, past Python too, what could be taken for an answer."""
    os.write(1, b'{"wrong": "", "lost": false}\n')
    print('{"wrong": "", "lost": false}', flush=True)
    return off(*args, **kwargs)


def runs_out_of_resources(*args: Any, **kwargs: Any) -> Any:
    from triton.runtime.errors import OutOfResources

    raise OutOfResources(294912, 232448, "shared memory")


def fails_in_ptxas(*args: Any, **kwargs: Any) -> Any:
    from triton.runtime.errors import PTXASError

    raise PTXASError("Internal Triton PTX codegen error\n`ptxas` stderr:\nline 3; error")


def does_not_compile(*args: Any, **kwargs: Any) -> Any:
    import ast

    from triton.compiler.errors import CompilationError

    source = "def kernel(x):\n    y = tl.dott(x, x)\n"
    raise CompilationError(source, ast.parse(source).body[0].body[0], "no function dott")  # type: ignore[attr-defined]


def has_no_compiler(*args: Any, **kwargs: Any) -> Any:
    subprocess.run(["false", *["-Wl,-rpath,/usr/lib/x86_64-linux-gnu"] * 9], check=True)


def has_no_file(*args: Any, **kwargs: Any) -> Any:
    return os.stat("/nowhere/ptxas")


def has_a_full_disk(*args: Any, **kwargs: Any) -> Any:
    raise OSError(28, "No space left on device")


def asserts(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError


def misses_a_key(*args: Any, **kwargs: Any) -> Any:
    raise KeyError("BLOCK_N")


def misses_an_attribute(*args: Any, **kwargs: Any) -> Any:
    raise AttributeError("'NoneType' object has no attribute 'utils'")


def misses_a_module(*args: Any, **kwargs: Any) -> Any:
    raise ImportError("libcuda.so.1: cannot open shared object file")


def has_no_memory(*args: Any, **kwargs: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def is_not_implemented(*args: Any, **kwargs: Any) -> Any:
    raise NotImplementedError("MatMul of sm_75")


def recurses(*args: Any, **kwargs: Any) -> Any:
    return recurses(*args, **kwargs)
