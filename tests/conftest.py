"""Loading of the kernels for Triton's interpreter, once for all tests, if there is no GPU.

`triton.jit` decides when a kernel is defined, so the variable must be set before the first import
of triton by any test. It is taken away again at once: only tests/kernels turns the interpreter on
(see there), and everything else, subprocesses included, sees what a user without a GPU sees.
"""

import os
from fnmatch import fnmatch

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime import interpreter

    from fastgpt_kernels import launch, registry

    registry.specs()  # loads every op, and with it the kernels
    launch.INTERPRETED = False
    del os.environ["TRITON_INTERPRET"]

    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor, scope):
        """Triton 3.6 makes a loop bound an int in a way that NumPy 2.4 refuses; 3.7 does not."""
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_tensor_and_index


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for marker in item.iter_markers("quick"):
            case = item.callspec.id  # type: ignore[attr-defined]
            if not any(fnmatch(case, pattern) for pattern in marker.args):
                item.add_marker(pytest.mark.slow)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
