"""Baselines: the ops by torch.compile, by PyTorch, and by other libraries, with versions.

A library is imported at its baseline's first call, so that a failure is that baseline's row. Copies
of the op's inputs in a library's layout are timed separately.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from importlib import metadata
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastgpt_kernels.reference import mlp
from fastgpt_kernels.registry import OpSpec

Function = Callable[..., Any]


@dataclass(frozen=True)
class Baseline:
    """Function of another library with the arguments of the op.

    package  its distribution, whose version is shown
    make     (module) -> a function of the op's inputs, or of those that `layout` returns
    layout   (*inputs, **arguments) -> copies of the inputs as the library takes them
    """

    package: str
    module: str
    make: Callable[[Any], Function]
    layout: Callable[..., list[Tensor]] | None = None

    @cached_property
    def kernel(self) -> Function:
        return self.make(importlib.import_module(self.module))

    def __call__(self, *inputs: Any, **arguments: Any) -> Any:
        if self.layout:
            inputs = (*self.layout(*inputs, **arguments),)
        return self.kernel(*inputs, **arguments)


def of(op: OpSpec, gpu: bool, autotune: bool) -> tuple[dict[str, Function], dict[str, str]]:
    """Returns an op's baselines by name and version, and the reasons why others cannot run."""
    found: dict[str, Function] = {f"torch.compile {torch.__version__}": torch.compile(op.reference)}
    skipped: dict[str, str] = {}
    for name, baseline in BASELINES.get(op.name, {}).items():
        if name == SLOW and not autotune:
            skipped[name] = "compiles for minutes: --autotune"
            continue
        try:
            found[f"{name} {metadata.version(baseline.package)}"] = baseline
        except metadata.PackageNotFoundError:
            skipped[name] = f"{baseline.package} is not installed"
    return (found, skipped) if gpu else ({}, skipped | dict.fromkeys(found, "needs a GPU"))


class TwoPasses(torch.autograd.Function):
    """Op by forward(*inputs) -> y, tensors to save, and backward(dy, *saved) -> gradients."""

    @staticmethod
    def forward(ctx: Any, forward: Function, backward: Function, *inputs: Tensor | None) -> Tensor:
        y, saved = forward(*(None if x is None else x.detach() for x in inputs))
        ctx.save_for_backward(*saved)
        ctx.passed = backward
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return None, None, *ctx.passed(dy, *ctx.saved_tensors)


# --- Attention -----------------------------------------------------------------------------------


def on_qkv(function: Function) -> Function:
    """Returns the op from a function of qkv (B, T, 3, heads, head dim)."""

    def attend(qkv: Tensor, *, n_head: int, bias: Tensor | None = None, **_: Any) -> Any:
        qkv = qkv if bias is None else qkv + bias.to(qkv.dtype)
        return function(qkv.unflatten(-1, (3, n_head, -1)))

    return attend


def sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    with sdpa_kernel([backend]):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def packed(forward: Function, backward: Function) -> Function:
    """Returns the op by kernels that read q, k, v inside qkv and write dq, dk, dv inside dqkv.

    They are (q, k, v) -> y, statistics and (dy, q, k, v, y, statistics, dq, dk, dv) -> None.
    """

    def run(qkv: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        y, stats = forward(*qkv.unbind(2))
        return y.flatten(2), (qkv, y, stats)

    def back(dy: Tensor, qkv: Tensor, y: Tensor, stats: Tensor) -> tuple[Tensor]:
        dqkv = torch.empty_like(qkv)
        backward(dy.reshape(y.shape), *qkv.unbind(2), y, stats, *dqkv.unbind(2))
        return (dqkv,)

    return on_qkv(partial(TwoPasses.apply, run, back))


def flash_attention_4(module: Any) -> Function:
    """Returns FlashAttention 4's two passes; the backward one takes dq, dk and dv."""
    return packed(
        lambda q, k, v: module._flash_attn_fwd(q, k, v, causal=True, return_lse=True)[:2],
        lambda dy, q, k, v, y, lse, dq, dk, dv: module._flash_attn_bwd(
            q, k, v, y, dy, lse, causal=True, dq=dq, dk=dk, dv=dv
        ),
    )


def cudnn_attention(cudnn: Any) -> Function:
    """Returns cuDNN's attention by graphs of its frontend, whose tensors have any strides."""
    kinds, handle, graphs = cudnn.data_type, cudnn.create_handle(), dict[Any, Any]()

    def run(name: str, inputs: dict[str, Tensor], results: Sequence[Tensor], **more: Any) -> None:
        """Executes a graph of the node `name`; it takes (B, heads, T, head dim)."""
        tensors = [t.transpose(1, 2) for t in (*inputs.values(), *results)]
        q, key = tensors[0], (name, tensors[0].shape, tensors[0].dtype)
        if key not in graphs:
            io = {torch.bfloat16: kinds.BFLOAT16, torch.float16: kinds.HALF}[q.dtype]
            wide = {"intermediate_data_type": kinds.FLOAT, "compute_data_type": kinds.FLOAT}
            graph = cudnn.pygraph(handle=handle, io_data_type=io, **wide)
            ends = [graph.tensor_like(t) for t in tensors[: len(inputs)]]
            options = {"attn_scale": q.shape[-1] ** -0.5, "use_causal_mask": True, **more}
            made = getattr(graph, name)(**dict(zip(inputs, ends, strict=True)), **options)
            for end, t in zip(made, tensors[len(inputs) :], strict=True):
                end.set_output(True).set_dim(t.shape).set_stride(t.stride())
                end.set_data_type(kinds.FLOAT if t.dtype == torch.float32 else io)
            graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
            space = q.new_empty(graph.get_workspace_size(), dtype=torch.uint8)
            graphs[key] = graph, [*ends, *made], space
        graph, ends, space = graphs[key]
        cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
        graph.execute(dict(zip(ends, tensors, strict=True)), space, handle=handle)

    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        (B, T, H, _), y = q.shape, q.new_empty(q.shape)
        stats = q.new_empty(B, H, T, 1, dtype=torch.float32).transpose(1, 2)
        run("sdpa", {"q": q, "k": k, "v": v}, (y, stats), generate_stats=True)
        return y, stats

    def backward(dy: Tensor, *tensors: Tensor) -> None:
        inputs = dict(zip(("q", "k", "v", "o", "stats"), tensors, strict=False))
        run("sdpa_backward", inputs | {"dO": dy}, tensors[5:])

    return packed(forward, backward)


# --- Norms, matmuls and losses -------------------------------------------------------------------


def quack_layer_norm(module: Any) -> Function:
    """Returns QuACK's norm, whose two passes are functions of rows."""

    def forward(x: Tensor, w: Tensor, b: Tensor | None) -> tuple[Tensor, tuple[Any, ...]]:
        y, *stats = module.layernorm_fwd(x.flatten(0, -2), w, b, 1e-5, True, True)
        return y.view_as(x), (x, w, b, *stats)

    def backward(dy: Tensor, x: Tensor, w: Tensor, b: Tensor | None, *stats: Tensor) -> Any:
        tensors = x.flatten(0, -2), w, dy.flatten(0, -2), *stats
        dx, *others = module.layernorm_bwd(*tensors, b is not None)
        return dx.view_as(x), *others

    return lambda x, w, b=None: TwoPasses.apply(forward, backward, x, w, b)


def quack_mlp(module: Any) -> Function:
    """Returns QuACK's MLP, which has GELU in its matmuls (GemmAct)."""
    names = {"tanh": "gelu_tanh_approx", "none": "gelu_erf"}
    return lambda x, fc, fc_bias, proj, proj_bias, *, approximate: module.mlp_func(
        x, fc, proj, names[approximate], bias1=fc_bias, bias2=proj_bias
    )


def loss(name: str, **options: Any) -> Callable[[Any], Function]:
    """Returns the maker of the op from a loss of (*inputs, targets), or one of Liger's classes."""

    def make(module: Any) -> Function:
        found = partial(getattr(module, name), ignore_index=-1, **options)
        if not name.startswith("Liger"):
            return lambda *inputs, targets, **_: found(*inputs, targets)
        computed = found()  # which takes the weight before x
        return lambda *inputs, targets, **_: computed(*inputs[::-1], targets)

    return make


def low(x: Tensor, *weights: Tensor | None, **_: Any) -> list[Any]:
    """Returns x, and weights in its dtype."""
    return [x, *(None if w is None else w.to(x.dtype) for w in weights)]


def columns(logits: Tensor, *, vocab_size: int, **_: Any) -> list[Tensor]:
    """Returns the logits without the columns that pad the vocabulary."""
    return [logits[:, :vocab_size]]


def rows(x: Tensor, w: Tensor, *, vocab_size: int, multiple: int = 1, **_: Any) -> list[Tensor]:
    """Returns x, and the tokens' rows of the weight in its dtype, with zeros up to a multiple."""
    found, more = w[:vocab_size].to(x.dtype), -vocab_size % multiple
    return [x, F.pad(found, (0, 0, 0, more)) if more else found]


# Inductor chooses among cuBLAS and Triton's templates, that with TMA included.
SLOW = "max-autotune"
AUTOTUNED: dict[str, Any] = {"max_autotune": True, "triton.enable_persistent_tma_matmul": True}
QUACK, LIGER, TORCH = "quack-kernels", "liger-kernel", ("torch", "torch.nn.functional")
LIGER_LOSSES = LIGER, "liger_kernel.transformers"
# Contiguous q, k and v (B, heads, T, head dim)
SEPARATE = on_qkv(lambda qkv: [x.transpose(1, 2).contiguous() for x in qkv.unbind(2)])
# Kernels alone of the implementations of these names, which have the copies around them
SDPA = {
    "flash": Baseline(*TORCH, lambda _: partial(sdpa, SDPBackend.FLASH_ATTENTION), SEPARATE),
    "cudnn": Baseline(*TORCH, lambda _: partial(sdpa, SDPBackend.CUDNN_ATTENTION), SEPARATE),
}
BASELINES = {
    "attention": {
        "cuDNN, packed": Baseline("nvidia-cudnn-frontend", "cudnn", cudnn_attention),
        "FA3, packed": Baseline(
            "flash_attn_3", "flash_attn_interface", lambda m:
            on_qkv(lambda qkv: m.flash_attn_qkvpacked_func(qkv, causal=True).flatten(2)),
        ),
        "FA4, packed": Baseline("flash-attn-4", "flash_attn.cute.interface", flash_attention_4),
    },
    "layer_norm": {
        "QuACK": Baseline(QUACK, "quack.rmsnorm", quack_layer_norm),
        "Liger": Baseline(
            LIGER, "liger_kernel.ops.layer_norm", lambda m: lambda x, w, b=None:
            m.LigerLayerNormFunction.apply(x, w, torch.zeros_like(w) if b is None else b, 1e-5),
        ),
    },
    "mlp": {
        "QuACK": Baseline(QUACK, "quack.mlp", quack_mlp, low),
        SLOW: Baseline(*TORCH, lambda _: torch.compile(mlp, options=AUTOTUNED)),
    },
    "cross_entropy": {
        "QuACK": Baseline(QUACK, "quack.cross_entropy", loss("cross_entropy"), columns),
        "Liger": Baseline(*LIGER_LOSSES, loss("LigerCrossEntropyLoss"), columns),
    },
    "linear_cross_entropy": {
        "torch, chunks": Baseline(  # since 2.13
            "torch", "torch.nn", lambda nn: loss(
                "linear_cross_entropy", options=nn.LinearCrossEntropyOptions()
            )(nn.functional), rows,
        ),
        "QuACK, vocabulary padded": Baseline(
            QUACK, "quack.linear_cross_entropy", loss("chunked_linear_cross_entropy"),
            partial(rows, multiple=128),
        ),
        "Liger": Baseline(*LIGER_LOSSES, loss("LigerFusedLinearCrossEntropyLoss"), rows),
    },
}  # fmt: skip
