"""Traced training steps as rows: which kernel, of which shape, how often, how long, and its bound.

On a GPU the pieces of work are kernels, each with the host's ops around its launch. On a CPU they
are the ops, each without the time of those inside it. A piece belongs to a part of the step by the
names around it: the first rule that fits any of them counts.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastgpt_kernels.registry import Cost, OpSpec, Sizes, spec, specs

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
PARTS = (LINEAR, ATTENTION, HEAD, MEMORY, OPTIMIZER, MUON, OTHER)
# fastgpt's own ops by what a trace calls them: kernels, registered ops and autograd functions. Of
# ops that share kernels the last counts: add_layer_norm, and cross_entropy without matmuls.
OWN = {
    name: op
    for op in specs()
    for name in (*op.kernels, *(f"fastgpt::{op.name}{e}" for e in ("", "_backward", "Backward")))
}
# Ops of a CPU that only describe memory or call others: their time is the host's.
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
    r"|elementwise|reduce_kernel|triton_(poi|red|per|mix|for)_fused|cpp_fused|^aten::(index_\w+"
    r"|copy_|clone|cat|stack|fill_|zeros?_?(like)?|add|sub|mul|div|sum|mean|where|neg|r?sqrt|pow"
    r"|tanh|exp|abs|ne|eq|lt|ge|gt|isfinite|clamp|reciprocal|slice_backward|bitwise_\w+)_?$",
}
NOISE = r"^void |<.*|\(anonymous namespace\)::|at::native::|(?<=.)\(.*"  # of a kernel's name
CATEGORIES = {"linear": LINEAR, "attention": ATTENTION, "head": HEAD, "memory": MEMORY}


@dataclass
class Row:
    """All pieces of one kernel, pass and shape, per step; a bound of 0 is not known."""

    part: str
    kernel: str
    kind: str  # forward, backward (of matmuls dX or dW), or update
    shape: str
    launches: float = 0.0
    ms: float = 0.0
    bound_ms: float = 0.0
    bound: str = ""  # matmul peak, or memory


@dataclass(frozen=True)
class Context:
    """The sizes that shapes in a trace mean, and the rates per second that bounds are made of."""

    sizes: Sizes
    n_layer: int
    micro_batches: int
    itemsize: int
    matmul_flops: float
    copy_bytes: float


def rows_of(events: Sequence[dict[str, Any]], c: Context) -> tuple[list[Row], float]:
    """Returns the rows, and the ms of a traced step on the host; steps are marked `STEP`."""
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
            key = own[-1].name, backward
            costs[key] = cost_of(own[-1], backward, c)
        elif id(source) not in counted and (kernel or us > source.get("dur", math.inf) / 2):
            counted.add(id(source))  # a second kernel of the same op has no bound of its own
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


def cost_of(own: OpSpec, backward: bool, c: Context) -> list[float]:
    """Returns FLOPs and bytes per step of one pass of an op."""
    costs = own.cost(c.sizes, c.itemsize)
    one = costs.get("backward" if backward else "forward") or costs.get("both", Cost())
    calls = own.calls_per_step * c.n_layer / 12 if own.calls_per_step > 1 else 1
    return [calls * c.micro_batches * one.flops, calls * c.micro_batches * one.bytes]


def part_of(
    names: Sequence[str], shapes: Sequence[Sequence[int]], after: bool, c: Context, host: bool
) -> str:
    """Returns the part of the step; `after`: between the last gradient and the end of the step."""
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
    s = c.sizes  # a size that only the vocabulary has marks the head's matmuls
    vocabulary = {s.vocab_size, s.padded_vocab_size} - {s.n_embd, 3 * s.n_embd, 4 * s.n_embd}
    return HEAD if part == LINEAR and vocabulary & {*shapes[-1]} - {s.tokens} else part


def pieces(events: Sequence[dict[str, Any]]) -> Iterator[tuple[float, float, list[dict], str]]:
    """Yields each piece's µs, its launch time, the ops around it and its kernel ("" on a CPU)."""
    on_device = [e for e in events if e.get("cat") in ON_DEVICE]
    launches: dict[int, tuple[float, list[dict]]] = {}
    for op, around, own in host_ops(events):
        if op["cat"] in LAUNCHES:
            launches[op.get("args", {}).get("correlation", -1)] = op["ts"], around
        elif not on_device and own > 0 and op["name"] != STEP:
            yield own, op["ts"], [*around, op], ""
    for e in on_device:
        ts, around = launches.get(e.get("args", {}).get("correlation", -1), (e["ts"], []))
        yield e["dur"], ts, around, e["name"]


def host_ops(events: Sequence[dict[str, Any]]) -> list[tuple[dict, list[dict], float]]:
    """Returns each of the host's events, those around it outermost first, and its own µs."""
    stacks, found, own = defaultdict[Any, list](list), [], dict[int, float]()
    on_host = (e for e in events if e.get("cat") in ("cpu_op", "user_annotation", *LAUNCHES))
    for e in sorted(on_host, key=lambda e: (e["ts"], -e["dur"])):
        stack = stacks[e["tid"]]
        while stack and stack[-1]["ts"] + stack[-1]["dur"] <= e["ts"]:
            stack.pop()
        if stack:
            own[id(stack[-1])] -= e["dur"]
        own[id(e)] = e["dur"]
        found.append((e, [*stack]))
        stack.append(e)
    return [(e, around, own[id(e)]) for e, around in found]


def inputs_of(op: dict[str, Any]) -> list[tuple[tuple[int, ...], int]]:
    """Returns shape and bytes per element of an op's inputs, if it is one with a trace of them."""
    if not op["name"].startswith(("aten::", "triton_", "mkldnn", "fastgpt::mlp")):
        return []
    args, found = op.get("args", {}), []
    for dims, kind in zip(args.get("Input Dims", ()), args.get("Input type", ()), strict=False):
        several = dims if dims and isinstance(dims[0], list) else [dims]
        found += [(tuple(one), ITEMSIZES.get(kind, 4)) for one in several if one]
    return found


def moved(op: dict[str, Any]) -> float:
    """Returns a lower bound on the bytes that an op moves: each of its inputs once."""
    if re.search("embedding|index|gather|scatter", op["name"]):
        return 0.0  # it reads some rows only
    total = float(sum(math.prod(shape) * itemsize for shape, itemsize in inputs_of(op)))
    # AdamW reads weights, gradients and two moments, and writes all but the gradients.
    return total * 28 / 16 if op["name"] == "aten::_fused_adamw_" else total


def gemm_of(stack: Sequence[dict[str, Any]]) -> tuple[int, ...]:
    """Returns M, N, K (and the batch) of the innermost matmul around a piece; () without one."""
    for op in reversed(stack):
        if op["name"] in GEMMS and (inputs := inputs_of(op)):
            (a, _), (b, _) = inputs[GEMMS[op["name"]] :][:2]
            return a[-2], b[-1], a[-1], *a[:-2]
    return ()
