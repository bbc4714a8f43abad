"""Rows of a traced training step: kernel, shape, launches, time and lower bound.

On a GPU the pieces of work are kernels, each with the host's ops around its launch. On a CPU they
are the ops, each without the time of the ops inside it. The first rule that matches a name around a
piece decides its part of the step.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from fastgpt_kernels.registry import Cost, Sizes, spec, specs

STEP = "bench.step"  # the scope around each traced step
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCHES = ("cuda_runtime", "cuda_driver")
ENGINE = "autograd::engine::evaluate_function"
# Matmuls, and the place of their operands a, b among the inputs.
GEMMS = {"aten::mm": 0, "aten::bmm": 0, "aten::addmm": 1, "aten::baddbmm": 1}
GEMMS |= {f"fastgpt::mlp_{x}{y}": 0 for x in ("hopper", "cublaslt") for y in ("", "_backward")}
ITEMSIZES = {"c10::BFloat16": 2, "c10::Half": 2, "double": 8, "long int": 8, "bool": 1}  # others: 4

LINEAR, ATTENTION, HEAD = "linear layers", "attention", "head and loss"
MEMORY, OPTIMIZER, MUON = "memory-bound ops", "optimizer and casts", "Muon"
OTHER, GAPS = "other", "gaps: launch, data, host"
# In the order of the picture, with Okabe and Ito's colours, which colour-blind people tell apart
PARTS = {
    LINEAR: "#0072b2", ATTENTION: "#d55e00", HEAD: "#cc79a7", MEMORY: "#e69f00",
    OPTIMIZER: "#009e73", MUON: "#004d38", OTHER: "#000000",
}  # fmt: skip
# fastgpt's ops by the names in a trace: kernels, registered ops and autograd functions. Of ops that
# share kernels the last counts: add_layer_norm, and cross_entropy without matmuls.
OWN = {
    name: op
    for op in specs()
    for name in (*op.kernels, *(f"fastgpt::{op.name}{e}" for e in ("", "_backward", "Backward")))
}
# A CPU's ops that only describe memory or call others, whose time is the host's
HOST = re.compile(
    r"^aten::(as_strided|t|transpose|view|view_as|_unsafe_view|permute|(un)?squeeze|expand|slice"
    r"|select|split|split_with_sizes|narrow|unbind|detach_?|resize_|item|_local_scalar_dense|to"
    r"|resolve_\w+|flatten|reshape|alias|(new_)?empty\w*|matmul|linear|dropout|set_|scalar_tensor)$"
    r"|^(?!aten::|mkldnn|cpp_fused)"
)
CAST = re.compile(r"^aten::_to_copy$|fused__to_copy(_(t|view|permute|mm))*_\d+$|ToCopyBackw", re.M)
RULES = {
    OPTIMIZER: r"multi_tensor_apply|[aA]dam|[lL]p[nN]orm|_foreach_norm|_amp_|AccumulateGrad",
    HEAD: r"cross_?entropy|CrossEntropy|log_?softmax|LogSoft|nll_?loss|NllLoss|SoftMax(For|Back)",
    ATTENTION: r"^attention|scaled_dot_product|ScaledDotProd|flash_(fwd|bwd|attention)|fmha"
    r"|efficient_attention|cudnn.*sdpa|sdpa_sm|flex_attention|_softmax|SoftmaxB|aten::(badd)?bmm$",
    LINEAR: r"^aten::(mm|addmm|addmv|mv)$|(Mm|Addmm|Linear)Backward\d*$|^mkldnn_linear"
    r"|gemm|gemv|nvjet|xmma|cutlass|cublas|splitK|triton_tem_fused.*mm",
    MEMORY: r"layer_?norm|LayerNorm|GammaBeta|RowwiseMoments|[gG]elu|GELU|[eE]mbedding|RadixSort"
    r"|compute_grad_weight|[dD]ropout|bernoulli|Memcpy|Memset|CatArray|direct_copy|FillFunctor"
    r"|elementwise|reduce_kernel|triton_(poi|red|per|mix|for)_fused|cpp_fused|^aten::",
}
NOISE = r"^void |<.*|\(anonymous namespace\)::|at::native::|(?<=.)\(.*"  # of a kernel's name
CATEGORIES = {"linear": LINEAR, "attention": ATTENTION, "head": HEAD, "memory": MEMORY}


@dataclass
class Row:
    """Pieces of one kernel, pass and shape, per step. A bound of 0 is unknown."""

    part: str
    kernel: str
    kind: str  # forward, backward, dX or dW of a matmul, or update
    shape: str
    launches: float = 0.0
    ms: float = 0.0
    bound_ms: float = 0.0
    bound: str = ""  # matmul peak, or memory


class Context(NamedTuple):
    """Sizes of the traced model, and the rates per second that bounds are made of."""

    sizes: Sizes
    n_layer: int
    micro_batches: int
    itemsize: int
    matmul_flops: float
    copy_bytes: float


def rows_of(events: Sequence[dict[str, Any]], c: Context) -> tuple[list[Row], float]:
    """Returns the rows, and the ms of a traced step, a scope named `STEP`, on the host."""
    steps = [(e["ts"], e["ts"] + e["dur"]) for e in events if e["name"] == STEP]
    engine = [(e["ts"], e["ts"] + e["dur"]) for e in events if e["name"].startswith(ENGINE)]
    updates = [(max((b for a, b in engine if s[0] <= a < s[1]), default=s[1]), s[1]) for s in steps]
    rows: dict[tuple[str, ...], Row] = {}
    costs: dict[tuple, list[float]] = defaultdict(lambda: [0.0, 0.0])  # FLOPs and bytes
    members: dict[tuple, dict[int, Row]] = defaultdict(dict)  # rows that share a cost
    counted = set[int]()
    for us, launched, stack, kernel in pieces(events):
        names = [op["name"] for op in stack if op["name"] != STEP] + [kernel] * bool(kernel)
        after = any(a <= launched < b for a, b in updates)
        source: dict[str, Any] = next((o for o in stack[::-1] if inputs_of(o)), {"name": ""})
        shapes, gemm = [shape for shape, _ in inputs_of(source)], gemm_of(stack)
        part = part_of(names, [*shapes, gemm], after, c, host=not kernel)
        if part == GAPS:
            continue
        backward = any(name.startswith(ENGINE) for name in names)
        kind = "update" if after else "backward" if backward else "forward"
        if gemm and backward and part != ATTENTION:
            kind = "dW" if gemm[2] == c.sizes.tokens else "dX"
        shape = " x ".join(map(str, gemm or max(shapes, key=math.prod, default=())))
        key: tuple = part, re.sub(NOISE, "", names[-1])[:50], kind, shape
        row = rows.setdefault(key, Row(*key))
        row.launches += 1 / len(steps)
        row.ms += us / 1e3 / len(steps)
        own = [OWN[n] for n in names if n in OWN] + [spec("attention")] * (part == ATTENTION)
        if own and not gemm:
            key, passes = (own[-1].name, backward), own[-1].cost(c.sizes, c.itemsize)
            one = passes.get("backward" if backward else "forward", passes.get("both", Cost()))
            n = own[-1].calls_per_step  # of 12 layers
            calls = c.micro_batches * (n * c.n_layer / 12 if n > 1 else 1)
            costs[key] = [calls * one.flops, calls * one.bytes]
        elif id(source) not in counted and (kernel or us > source.get("dur", math.inf) / 2):
            counted.add(id(source))  # a second kernel of the same op adds no bound
            costs[key][0] += 2.0 * math.prod(gemm) / len(steps) * (source["name"] in GEMMS)
            costs[key][1] += moved(source) / len(steps)
        members[key][id(row)] = row
    for key, (flops, n_bytes) in costs.items():
        compute, memory = flops / c.matmul_flops * 1e3, n_bytes / c.copy_bytes * 1e3
        total = sum(row.ms for row in members[key].values())
        for row in members[key].values() if max(compute, memory) > 0 else ():
            row.bound_ms += max(compute, memory) * row.ms / total
            row.bound = "matmul peak" if compute >= memory else "memory"
    return [*rows.values()], sum(b - a for a, b in steps) / 1e3 / len(steps)


def part_of(names: Sequence[str], shapes: Any, after: bool, c: Context, host: bool) -> str:
    """Returns the part of a piece's step. `after` the last gradient all is the optimizer's."""
    text = "\n".join(names)
    if not names or "Memcpy HtoD" in names[-1] or (host and HOST.search(names[-1])):
        return GAPS
    if after:
        return MUON if "#Muon." in text and not re.search("[aA]dam", text) else OPTIMIZER
    if own := next((OWN[name] for name in names if name in OWN), None):
        return CATEGORIES.get(own.category, OPTIMIZER)
    if CAST.search(text) and math.prod(shapes[0][:-1]) != c.sizes.tokens:
        return OPTIMIZER  # weights, in 16 bits
    part = next((part for part, rule in RULES.items() if re.search(rule, text, re.M)), OTHER)
    s = c.sizes  # the vocabulary's size marks the head's matmuls
    vocabulary = {s.vocab_size, s.padded_vocab_size} - {s.n_embd, 3 * s.n_embd, 4 * s.n_embd}
    return HEAD if part == LINEAR and vocabulary & {*shapes[-1]} - {s.tokens} else part


def pieces(events: Sequence[dict[str, Any]]) -> Iterator[tuple[float, float, list[dict], str]]:
    """Yields each piece's µs, launch time, ops around it, and kernel ("" on a CPU)."""
    on_device = [e for e in events if e.get("cat") in ON_DEVICE]
    on_host = (e for e in events if e.get("cat") in ("cpu_op", "user_annotation", *LAUNCHES))
    stacks, own, ops = defaultdict[Any, list](list), dict[int, float](), list[list[dict]]()
    launches: dict[int, list[dict]] = {}
    for op in sorted(on_host, key=lambda e: (e["ts"], -e["dur"])):
        stack = stacks[op["tid"]]  # the outermost op first
        while stack and stack[-1]["ts"] + stack[-1]["dur"] <= op["ts"]:
            stack.pop()
        if stack:
            own[id(stack[-1])] -= op["dur"]
        own[id(op)] = op["dur"]
        stack.append(op)
        ops.append([*stack])
        if op["cat"] in LAUNCHES:
            launches[op.get("args", {}).get("correlation", -1)] = ops[-1]
    for around in ops if not on_device else ():
        op = around[-1]
        if own[id(op)] > 0 and op["name"] != STEP:
            yield own[id(op)], op["ts"], around, ""
    for e in on_device:
        *around, launch = launches.get(e.get("args", {}).get("correlation", -1), [e])
        yield e["dur"], launch["ts"], around, e["name"]


def inputs_of(op: dict[str, Any]) -> list[tuple[tuple[int, ...], int]]:
    """Returns shape and bytes per element of the inputs that a trace shows of an op."""
    if not op["name"].startswith(("aten::", "triton_", "mkldnn", "fastgpt::mlp")):
        return []
    args, found = op.get("args", {}), []
    for dims, kind in zip(args.get("Input Dims", ()), args.get("Input type", ()), strict=False):
        several = dims if dims and isinstance(dims[0], list) else [dims]
        found += [(tuple(one), ITEMSIZES.get(kind, 4)) for one in several if one]
    return found


def moved(op: dict[str, Any]) -> float:
    """Returns a lower bound of the bytes that an op moves: each input once."""
    if re.search("embedding|index|gather|scatter", op["name"]):
        return 0.0  # only some rows are read
    total = float(sum(math.prod(shape) * itemsize for shape, itemsize in inputs_of(op)))
    # AdamW reads weights, gradients and two moments, and writes all but the gradients.
    return total * 28 / 16 if op["name"] == "aten::_fused_adamw_" else total


def gemm_of(stack: Sequence[dict[str, Any]]) -> tuple[int, ...]:
    """Returns M, N, K and the batch of the innermost matmul around a piece, or ()."""
    for op in reversed(stack):
        if op["name"] in GEMMS and (inputs := inputs_of(op)):
            (a, _), (b, _) = inputs[GEMMS[op["name"]] :][:2]
            return a[-2], b[-1], a[-1], *a[:-2]
    return ()
