"""Without Triton (macOS), or with a broken one, every op runs its reference."""

import json
import os
import subprocess
import sys

import pytest

# `import triton` finds nothing, or a package that fails.
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
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    functions = {name: getattr(fastgpt_kernels, name) for name in fastgpt_kernels.OPS}
from fastgpt_kernels.registry import Sizes, differentiate, normal, specs

for op in specs():
    for example in op.example_inputs(Sizes(2, 8, 2, 64, 61, 128), normal(torch.device("cpu"))):
        found = differentiate(functions.pop(op.name, op.triton), example)
        assert all(map(torch.equal, found, differentiate(op.reference, example))), op.name
print(json.dumps([[*functions], [str(w.message) for w in caught]]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("missing", MISSING)
def test_every_op_runs_and_one_line_says_how(missing: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.replace("ERROR", MISSING[missing])],
        capture_output=True, text=True, timeout=120, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = "fastgpt_kernels: triton is not installed, so every function runs its reference"
    assert json.loads(done.stdout) == [[], [said]]
