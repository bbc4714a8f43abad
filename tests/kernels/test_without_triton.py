"""Where Triton does not exist (macOS) or is broken: every public function runs its reference."""

import json
import os
import subprocess
import sys

import pytest

import fastgpt_kernels

# What `import triton` finds: nothing, or a package that fails.
MISSING = {"absent": "ModuleNotFoundError", "broken": "ImportError"}
PROGRAM = """
import json, sys, warnings

class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "triton":
            raise ERROR("no triton in this test")

sys.meta_path.insert(0, Finder)
import torch
import fastgpt_kernels
from fastgpt_kernels import reference

torch.manual_seed(0)
x, weight = torch.randn(2, 4, 8, requires_grad=True), torch.randn(24, 8, requires_grad=True)
gain, bias, down = torch.ones(8), torch.zeros(24), torch.randn(8, 24)
targets = torch.tensor([[0, 1, 2, -1], [3, 4, 5, 6]])
calls = {
    "attention": lambda f: f(x.repeat(1, 1, 24), 2),
    "layer_norm": lambda f: f(x, gain),
    "add_layer_norm": lambda f: f(x, x, gain)[0],
    "bias_gelu": lambda f: f(x),
    "linear_cross_entropy": lambda f: f(x, weight, targets),
    "cross_entropy": lambda f: f(x, targets),
}
ran = []
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for name, call in calls.items():
        y, wanted = call(getattr(fastgpt_kernels, name)), call(getattr(reference, name))
        assert torch.equal(y, wanted), name
        if y.requires_grad:
            assert torch.autograd.grad(y.sum(), x)[0].isfinite().all(), name
        ran.append(name)
print(json.dumps([sorted(ran), [str(w.message) for w in caught]]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("missing", MISSING)
def test_every_public_function_runs_and_one_line_says_how(missing: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.replace("ERROR", MISSING[missing])],
        capture_output=True, text=True, timeout=120, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ran, said = json.loads(done.stdout)
    measures = {"tune"}  # tests/plans
    assert ran == sorted({*fastgpt_kernels.__all__} - measures)
    assert said == [
        "fastgpt_kernels: no triton here, so every function runs its reference in PyTorch"
    ]
