"""The MLP's kernels for Hopper in the emulator: problems, one run, and bugs to plant.

python -m tests.kernels.gluon.mlp_cases [SEEDS]      the first problem under 1,000 seeds
"""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tests.kernels.gluon.emulator import emulated  # isort: skip - before Gluon is
from fastgpt_kernels import launch, mlp_hopper, reference
from tests.kernels.gluon import cases
from tests.kernels.gluon.planted import Bug, instead, without


@dataclass(frozen=True)
class Problem:
    """Sizes of x and dy (M, K) and of z (M, N), and what is asked for."""

    M: int
    N: int
    K: int
    programs: int = 2
    bias: bool = True
    dtype: torch.dtype = torch.bfloat16

    @functools.cached_property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """Returns x, W1 (N, K), dy, W2 (K, N), z, and b1 in fp32 or None."""
        generator = torch.Generator().manual_seed(self.M)
        M, N, K = self.M, self.N, self.K
        shapes = (M, K), (N, K), (M, K), (K, N), (M, N)
        x, fc, dy, proj, z = (torch.randn(s, generator=generator) for s in shapes)
        fc, proj = fc * K**-0.5, proj * K**-0.5
        bias = torch.randn(N, generator=generator) if self.bias else None
        return *(t.to(self.dtype) for t in (x, fc, dy, proj, z)), bias  # type: ignore[return-value]

    @functools.cached_property
    def truth(self) -> dict[str, Tensor]:
        """Returns in fp64 z of the forward pass, dz and its sums over rows."""
        x, fc, dy, proj, z = (t.double() for t in self.inputs[:5])
        bias = None if self.inputs[5] is None else self.inputs[5].double()
        dz = slope(z, bias) * (dy @ proj)
        return {"z": x @ fc.t(), "dz": dz, "sums": dz.sum(0)}


def slope(z: Tensor, bias: Tensor | None) -> Tensor:
    z = z.detach().requires_grad_()
    return torch.autograd.grad(reference.bias_gelu(z, bias).sum(), z)[0]


def results(p: Problem, seed: int, module: Any = mlp_hopper, strict: bool = True) -> dict[str, Any]:
    """Returns z, h, dz and the sums, emulated. Slots are two, so that a few steps go round them."""
    x, fc, dy, proj, z, bias = p.inputs
    config = replace(module.CONFIG, blocks={**module.CONFIG.blocks, "STAGES": 2})
    with (
        emulated(seed=seed, strict=strict),
        mock.patch.object(module, "multiprocessors", lambda x: p.programs),
        mock.patch.object(launch, "arch_of", lambda x: "sm_90"),  # bf16's tanh is the GPU's own
    ):
        found = dict(zip("zh", module.forward(x, fc, bias, config), strict=True))
        dz, sums = module.backward(dy, proj, z, bias, config)
    return found | {"dz": dz, "sums": sums}


def run(p: Problem, seed: int, module: Any = mlp_hopper, strict: bool = True) -> str:
    """Returns what is wrong with the values of both passes; empty if nothing is.

    h is held against gelu of the z that was found. The product in dz is rounded, and so is dz.
    """
    found, eps = results(p, seed, module, strict), torch.finfo(p.dtype).eps
    bias = None if p.inputs[-1] is None else p.inputs[-1].double()
    truth = p.truth | {"h": reference.bias_gelu(found["z"].double(), bias)}
    for name, allowed in {"z": eps / 2, "h": eps / 2, "dz": eps, "sums": eps}.items():
        if found[name] is None and not p.bias:
            continue
        off = ((found[name].double() - truth[name]).norm() / truth[name].norm()).item()
        if not off <= allowed:
            return f"{name} is off by {off:.3g}, {allowed:.3g} are allowed"
    return ""


# Tiles are of 128 x 256, steps of 64. With one program and two, tiles follow each other; 72 and
# 264 leave a ragged end of less than a chunk, 200 of more than a half tile, 129 of a row.
PROBLEMS = [
    Problem(384, 512, 192, bias=False),
    Problem(200, 264, 72, programs=1),
    Problem(256, 512, 192, programs=3),
    Problem(129, 256, 64, programs=1, dtype=torch.float16),
    Problem(128, 328, 320),
]

LET_GO = """            if n % CHUNKS == CHUNKS - 1:
                arrive_all(acc_empty.index(group))
"""
LOAD = "            acc = stage_s"
# fmt: off
BUGS = [
    without("        mbarrier.wait(empty.index(used % STAGES), used // STAGES & 1)"),
    instead("used // STAGES & 1)", "used // STAGES & 1 ^ 1)", "parity of a slot's release"),
    instead("acc = warpgroup_mma_wait(1,", "acc = warpgroup_mma_wait(2,", found_as="race"),
    instead(
        "if step > 0:\n                ahead = _release(operands, memory, sizes, ahead, count - 1,",
        "if step > 0:\n                ahead = _release(operands, memory, sizes, ahead, count,",
        "release of the product in flight",
    ),
    without("        mbarrier.wait(acc_empty.index(GROUP), done & 1 ^ 1)", found_as="race"),
    instead("(GROUP), done & 1 ^ 1", "(GROUP), done & 1", "parity of stage", "deadlock"),
    Bug("stage let go too early", [(LET_GO, ""), (LOAD, LET_GO + LOAD)], "race"),
    instead("n % CHUNKS == CHUNKS - 1:", "n % CHUNKS == 0:", "stage let go after a chunk", "race"),
    instead("mbarrier.wait(acc_full.index(group), done & 1)", "pass", "sums are not awaited"),
    instead("if n % CHUNKS == 0:\n", "if n == 0:\n", "one consumer is awaited", "race"),
    instead("acc = warpgroup_mma_wait(0,", "acc = warpgroup_mma_wait(1,", "", "before its wait"),
    instead("acc = gl.zeros(", "acc = acc if done else gl.zeros(", "", "off by"),
    instead("COLUMNS) * DEPTH * 2,", "COLUMNS) * DEPTH * 2 - 16384,", "fewer bytes expected"),
    instead("    fence_async_shared()\n", "", "no fence after the init", "no fence"),
    instead("row, column, n + 2, True", "row, column, n + 1, True", "z of a chunk too early"),
    instead("next_row, next_column, n + 2", "row, column, n + 2", "z of this tile again", "off by"),
    instead("(row // ROWS + group) * N", "(row // ROWS) * N", "sums of two groups in a row"),
    instead("a_s.index(slot * 2 + GROUP), b", "a_s.index(slot * 2), b", "rows of consumer 0"),
    instead("acc_empty = mbarriers(2, 1)", "acc_empty = mbarriers(2, 2)"),
    instead("rest % height) * (2 * ROWS)", "rest % height) * ROWS", "tiles overlap", "off by"),
]
# fmt: on


if __name__ == "__main__":
    sys.exit(cases.main([(run, PROBLEMS[0], mlp_hopper)], *map(int, sys.argv[1:])))
