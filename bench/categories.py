"""Which part of the step a piece of work belongs to: rules over names, shapes and phases.

A piece of work is known by the names around it, outermost first: profiler scopes, PyTorch ops and,
last, the kernel's own name. Rules are tried in order, and the first that fits any of the names
counts, so that a copy inside the attention is the attention's. What no rule knows is "other": it
gets a rung of its own and is never spread over the rest.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from fastgpt_kernels.registry import specs

# In order of precedence where two of them run at once: what computes counts before what moves.
CATEGORIES = (
    "linear", "attention", "head", "muon", "memory", "optimizer", "other", "data", "gaps"
)  # fmt: skip
DATA_SCOPE = "bench.data"
MUON = "momentum and update", "Newton-Schulz"  # items; the latter are its products

Dims = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Sizes:
    """What shapes in a trace mean: rows of one micro-batch, and the model's dimensions."""

    batch_size: int
    block_size: int
    n_layer: int
    n_head: int
    n_embd: int
    vocab_size: int
    padded_vocab_size: int
    bias: bool = False
    dropout: float = 0.0
    micro_batches: int = 1

    @property
    def tokens(self) -> int:
        """In one micro-batch."""
        return self.batch_size * self.block_size

    @property
    def head_sizes(self) -> frozenset[int]:
        """Sizes of a dimension that only the vocabulary has."""
        c, h = self.n_embd, self.n_head
        others = {c, 3 * c, 4 * c, h, c // h, self.batch_size, self.block_size, self.tokens}
        return frozenset({self.vocab_size, self.padded_vocab_size}) - others


@dataclass(frozen=True)
class Named:
    """What is known of a piece of work besides its time."""

    names: tuple[str, ...]  # outermost first; the last is what ran
    gemm: Dims = ()  # sizes of a and b of the innermost enclosing matrix product
    dims: Dims = ()  # operands of the innermost ATen op that has any
    backward: bool = False
    after_backward: bool = False  # between the last gradient and the end of the step


_rule = re.compile

SCOPE_ENDS = ("", "_backward", "Backward")
# Our own ops by what a trace calls them: their kernels, registered ops and autograd functions.
OURS = {
    name: op
    for op in specs()
    for name in (*op.kernels, *(f"fastgpt::{op.name}{end}" for end in SCOPE_ENDS))
}
# Matrix products, and the place of their operands a, b among the inputs; `out=` may follow.
GEMM_OPS = {"aten::mm": 0, "aten::bmm": 0, "aten::addmm": 1, "aten::baddbmm": 1}
_GEMM = _rule(
    r"^aten::(mm|addmm|matmul|linear|addmv|mv)$|^_LinearWithCopy$|(Mm|Addmm|Linear)Backward\d*$"
    r"|gemm|gemv|nvjet|xmma|cutlass|cublas|splitK|triton_tem_fused.*mm|^mkldnn_linear|Cijk_"
)
_BMM = _rule(r"^aten::(bmm|baddbmm)(_out)?$")
_ATTENTION = _rule(
    r"scaled_dot_product|ScaledDotProduct"
    r"|flash_(fwd|bwd|attention)|fmha|_efficient_attention|cudnn.*sdpa|sdpa_sm|flex_attention"
    r"|_softmax|SoftmaxBackward|^aten::(bmm|baddbmm)$|BmmBackward"  # SDPA in single ops
)
_HEAD = _rule(
    r"cross_entropy|log_softmax|LogSoftmax|nll_loss|NllLoss|CrossEntropy|SoftMax(For|Back)ward"
)
_CAST = _rule(
    r"^aten::_to_copy$|^triton_poi_fused__to_copy(_(t|view|permute|transpose|mm))*_\d+$|ToCopyBackward"
)
_MEMORY: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("norms", _rule(r"layer_?norm|LayerNorm|GammaBeta|RowwiseMoments")),
    ("GELU", _rule(r"gelu|Gelu|GELU")),
    (
        "embedding",
        _rule(
            r"embedding|Embedding|index_select|indexing_backward|index_put|compute_grad_weight|RadixSort"
        ),
    ),
    ("dropout", _rule(r"dropout|Dropout|bernoulli|distribution_elementwise")),
)
_MOVES = _rule(
    r"^aten::(copy_|clone|contiguous|cat|stack|fill_|zero_|zeros|zeros_like|slice_backward"
    r"|ones_like|new_zeros)$|Memcpy|Memset|CatArray|direct_copy|FillFunctor"
)
_ELEMENTWISE = _rule(
    r"^aten::(add|sub|mul|div|sum|mean|where|neg|sqrt|rsqrt|pow|tanh|exp|abs|ne|eq|lt|ge|gt|isfinite"
    r"|bitwise_\w+|__and__|reciprocal|clamp|isnan)_?$|elementwise|reduce_kernel"
    r"|triton_(poi|red|per|mix|for)_fused|^cpp_fused"
)
_OPTIMIZER = _rule(r"multi_tensor_apply|[aA]dam|lpnorm|LpNorm|_foreach_norm|_amp_|AccumulateGrad")
_CLIPPING = _rule(r"norm|Norm|_foreach_mul|clamp|reciprocal|stack|clip")
# Ops that only describe memory or wait: on a CPU their time is the host's.
_VIEWS = _rule(
    r"^(aten::)?(as_strided|transpose|view|_unsafe_view|t|permute|unsqueeze|squeeze|expand|slice"
    r"|select|split|split_with_sizes|narrow|unbind|detach|detach_|empty|empty_like|empty_strided"
    r"|new_empty|new_empty_strided|resize_|item|_local_scalar_dense|resolve_conj|resolve_neg"
    r"|flatten|reshape|alias|scalar_tensor|full|ones|to|lift_fresh|view_as|_reshape_alias"
    r"|is_nonzero|set_|movedim|numpy_T)$|^autograd::engine|Backward\d*$|Torch-Compiled"
    r"|^TorchDynamo|^AOTDispatcher|^Pregraph|^Optimizer\.|^bench\.|^$"
)


def categorize(work: Named, sizes: Sizes, *, host: bool) -> tuple[str, str]:
    """(category, item) of a piece of work; `host`: it is an op's own time on a CPU, not a kernel's.

    Items: passes of the linear layers, kinds of memory-bound work, parts of the optimizer.
    """
    names = work.names

    def has(rule: re.Pattern[str]) -> bool:
        return any(rule.search(name) for name in names)

    if host and not names:  # the loop's own Python
        return "gaps", "host"
    kernel = names[-1] if names else ""
    if DATA_SCOPE in names or kernel.startswith("Memcpy HtoD"):
        return ("gaps" if host else "data"), "data"
    if work.after_backward:
        if has(_rule("[aA]dam")):
            return "optimizer", "AdamW"
        if has(_rule("#Muon[.]")):
            return "muon", MUON[bool(work.gemm or has(_GEMM) or has(_BMM))]
        return "optimizer", "clipping" if has(_CLIPPING) else "rest"
    ours = next((OURS[name] for name in names if name in OURS), None)
    part = ours.category if ours else ""
    if has(_OPTIMIZER) or part == "optimizer":
        accumulates = any("AccumulateGrad" in name for name in names)
        return "optimizer", "gradient accumulation" if accumulates else "AdamW"
    if has(_HEAD) or part == "head":
        return "head", "GEMMs" if work.gemm or has(_GEMM) else "cross entropy"
    if has(_ATTENTION) or part == "attention":
        return "attention", "backward" if work.backward else "forward"
    if has(_GEMM) or part == "linear":
        if _has_size(work.gemm, sizes.head_sizes):
            return "head", "GEMMs"
        return "linear", gemm_pass(work, sizes)
    if has(_CAST) and not _is_activation(work.dims, sizes):
        return "optimizer", "casts of weights"
    if ours and part == "memory":
        return "memory", ours.label
    for item, rule in _MEMORY:
        if has(rule):
            return "memory", item
    if _has_size(work.dims, sizes.head_sizes):
        return "head", "copies and sums"
    if has(_CAST):
        return "memory", "casts"
    if has(_MOVES):
        return "memory", "copies"
    if has(_ELEMENTWISE):
        return "memory", "residual, bias, rest"
    if host and "Compiled" in kernel and "Torch-" not in kernel:
        return "memory", "compiled loops"  # Inductor's C++ for a CPU: what is fused has no names
    if host and _VIEWS.search(kernel):
        return "gaps", "host"
    return "other", kernel


def gemm_pass(work: Named, sizes: Sizes) -> str:
    """forward, dX or dW: the weight's gradient is the product that sums over the tokens."""
    if not work.gemm:
        return "autograd" if work.backward else "forward"
    if not work.backward:
        return "forward"
    return "dW" if gemm_shape(work.gemm)[2] == sizes.tokens else "dX"


def gemm_shape(operands: Dims) -> tuple[int, int, int, int]:
    """(M, N, K, batch) of a product from the sizes of a and b."""
    a, b = operands
    return a[-2], b[-1], a[-1], a[0] if len(a) == 3 else 1


def _has_size(dims: Dims, values: frozenset[int]) -> bool:
    return any(size in values for shape in dims for size in shape)


def _is_activation(dims: Dims, sizes: Sizes) -> bool:
    """Whether the first operand has a row a token."""
    if not dims or len(dims[0]) < 2:
        return False
    rows = math.prod(dims[0][:-1])
    return rows == sizes.tokens or dims[0][:2] == (sizes.batch_size, sizes.block_size)
