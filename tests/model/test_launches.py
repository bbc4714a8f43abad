"""The model launches only kernels that the ops' example inputs launch, which compile_check has."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import triton  # noqa: F401 - before the ops, which define no kernels without it

from fastgpt.model.gpt import GPT, ModelShape
from fastgpt.model.kernels import Kernels, Selected
from fastgpt_kernels import compile_check
from fastgpt_kernels.registry import Sizes, model_specs, specs

ROOT = Path(__file__).resolve().parents[2]


def train_and_evaluate(sizes: Sizes, implementation: str) -> None:
    """Runs a model of two layers on meta tensors, as the trainer and the evaluation run it."""
    ops = {op.name: op for op in model_specs()}
    chosen = {
        n: implementation if implementation in op.implementations else op.standard
        for n, op in ops.items()
    }
    functions = {n: ops[n].implementations[chosen[n]].function for n in ops}
    kernels = Kernels(functions, [Selected(n, i, "") for n, i in chosen.items()])
    shape = ModelShape(
        2, sizes.n_head, sizes.n_embd, sizes.block_size, sizes.vocab_size, sizes.bias, sizes.gelu
    )
    tokens, targets = torch.zeros(
        2, sizes.batch_size, sizes.block_size, dtype=torch.int64, device="meta"
    )
    with torch.device("meta"):
        model = GPT(shape, sizes.dropout, kernels, torch.bfloat16)
    model.make_weight_copies()
    model.use_main_grads()
    model(tokens, targets).backward()
    with torch.no_grad():
        model.eval()(tokens, targets)


def kinds(launches: list[compile_check.Launch]) -> dict[str, str]:
    """Returns each launch's name by all that decides its machine code."""
    found = {}
    for x in launches:
        s = x.source
        found[repr((s.fn.__name__, s.signature, s.constants, s.attrs, x.options))] = str(x)
    return found


def print_what_is_not_checked(arch: str) -> None:
    presets = compile_check.chosen_presets(arch, everything=True)
    checked = kinds(compile_check.record(arch, specs(), presets))
    with compile_check.recording(arch) as found:
        for sizes in presets.values():
            for implementation in ("triton", "hopper"):
                train_and_evaluate(sizes, implementation)
    launched = kinds(found)
    print(len(launched), "kinds of launches")
    print(
        *(f"not checked: {launched[kind]}" for kind in launched.keys() - checked.keys()), sep="\n"
    )


@pytest.mark.slow
def test_the_model_launches_what_is_checked() -> None:
    environment: dict[str, Any] = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = f"{ROOT}:{ROOT}/kernels"
    done = subprocess.run(
        [sys.executable, "-m", "tests.model.test_launches"],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert " kinds of launches" in done.stdout and "not checked" not in done.stdout, done.stdout


if __name__ == "__main__":
    print_what_is_not_checked("sm_90")
