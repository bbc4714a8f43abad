"""Nodes of one layer in the captured training graph, forward and backward.

They guard the fusions, since an added cast, copy or unfused op is a node that the table below
lacks. The graph is captured on a CPU as torch.compile does it, with the Triton kernels as custom
ops that never run. Views move no data and are left out. A commit that changes a count says why.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FUSED = {"fastgpt.layer_norm": 2, "fastgpt.attention": 1, "fastgpt.bias_gelu": 1}
FUSED_BACKWARD = {f"{name}_backward": times for name, times in FUSED.items()}
# Autograd writes the argument that the op changed back; Inductor takes these copies out again.
MAIN_GRAD = {"fastgpt.accumulate_matmul": 4, "aten.copy_": 4}

# The MLP with GELU in its matmuls: a launch less forward, and one backward.
WITHOUT_GELU = {name: times for name, times in FUSED.items() if name != "fastgpt.bias_gelu"}
MLPS = {name: {**WITHOUT_GELU, f"fastgpt.mlp_{name}": 1} for name in ("hopper", "cublaslt")}
MLPS_BACKWARD = {n: {f"{k}_backward": v for k, v in MLPS[n].items()} for n in MLPS}

Variant = tuple[bool, float, bool, str]  # bias, dropout, main_grad, the MLP's implementation
EXPECTED: dict[Variant, dict[str, dict[str, int]]] = {
    (False, 0.0, True, "eager"): {
        "forward": {**FUSED, "aten.mm": 4},
        "backward": {**FUSED_BACKWARD, "aten.mm": 4, **MAIN_GRAD},
    },
    (True, 0.1, False, "eager"): {
        "forward": {**FUSED, "aten.mm": 3, "aten.addmm": 1, "aten._to_copy": 1},  # c_attn.bias
        "backward": {**FUSED_BACKWARD, "aten.mm": 8, "aten._to_copy": 4},  # gradients to fp32
    },
}
for mlp, ops in MLPS.items():
    EXPECTED[False, 0.0, True, mlp] = {
        "forward": {**ops, "aten.mm": 3},
        "backward": {**MLPS_BACKWARD[mlp], "aten.mm": 3, **MAIN_GRAD},
    }
    EXPECTED[True, 0.1, False, mlp] = {
        "forward": {**ops, "aten.mm": 2, "aten.addmm": 1, "aten._to_copy": 1},
        "backward": {**MLPS_BACKWARD[mlp], "aten.mm": 7, "aten._to_copy": 4},
    }


def count(variant: Variant, n_layer: int) -> dict[str, Counter[str]]:
    """Returns the nodes of both graphs of a small model by name, in fp16 for the interpreter."""
    import torch
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    from fastgpt.config.presets import gpt2
    from fastgpt.config.settings import replace
    from fastgpt.model.build import build
    from fastgpt.model.device import Machine
    from fastgpt_kernels.registry import spec

    bias, dropout, main_grad, mlp = variant
    sizes = {"n_layer": n_layer, "n_head": 2, "n_embd": 128, "block_size": 64, "batch_size": 2}
    config = replace(gpt2(), **sizes, bias=bias, dropout=dropout, kernels="triton")
    model = build(config, 512, Machine(torch.device("cpu"), "float16"))
    model.kernels.mlp = spec("mlp").implementations[mlp].function  # no flag has it choose a CPU's
    model.make_weight_copies()
    if main_grad:
        model.use_main_grads()
    found: dict[str, Counter[str]] = {}

    def counting(name: str):
        def compiler(module: torch.fx.GraphModule, inputs):
            found[name] = Counter(filter(None, map(name_of, module.graph.nodes)))
            (results,) = module.graph.output_node().args
            return make_boxed_func(lambda *_: [empty_like(node) for node in results])

        return compiler

    backend = aot_autograd(
        fw_compiler=counting("forward"),
        bw_compiler=counting("backward"),
        partition_fn=min_cut_rematerialization_partition,
    )
    torch._dynamo.reset()
    tokens = torch.zeros(2, 64, dtype=torch.int64)
    torch.compile(model, backend=backend, fullgraph=True, dynamic=False)(tokens, tokens).backward()
    return found


def name_of(node) -> str:
    """Returns the name of a node that computes or moves data, or an empty one."""
    if node.op != "call_function" or getattr(node.target, "is_view", False):
        return ""
    target = node.target
    if str(target).startswith("auto_functionalized"):  # an op that changes its argument
        target = node.args[0]
    free = ("<built-in function getitem>", "aten._unsafe_view.default")
    return "" if str(target) in free else str(target).removesuffix(".default")


def empty_like(node):
    import torch

    value = getattr(node, "meta", {}).get("val")
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)


@pytest.fixture(scope="module")
def layers() -> list[dict[str, dict[str, int]]]:
    """Returns the nodes of a layer of each variant, from a process that interprets Triton."""
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("variant", EXPECTED, ids=str)
def test_nodes_of_a_layer(variant: Variant, layers):
    for name, wanted in EXPECTED[variant].items():
        found = layers[[*EXPECTED].index(variant)][name]
        more, fewer = Counter(found) - Counter(wanted), Counter(wanted) - Counter(found)
        assert found == wanted, f"{name}: more {dict(more)}, fewer {dict(fewer)}"


def main() -> None:
    models = [(count(variant, 1), count(variant, 2)) for variant in EXPECTED]
    print(json.dumps([{name: two[name] - one[name] for name in one} for one, two in models]))


if __name__ == "__main__":
    main()
