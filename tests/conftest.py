"""Where there is no GPU the kernels are loaded for Triton's interpreter, once for all tests.

`triton.jit` decides when a kernel is defined, so the variable must be set before the first import
of triton by any test. It is taken away again at once: only tests/kernels sets it (see there), and
everything else, subprocesses included, sees a machine without a GPU as a user would.
"""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    import fastgpt_kernels  # noqa: F401

    del os.environ["TRITON_INTERPRET"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
