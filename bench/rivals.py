"""Who else computes the ops: PyTorch's other ways and other libraries, by op.

A rival's function is made at its first call: another library's import can fail in any way, and then
the failure is that rival's own. Rivals need a GPU; the others are listed with the reason.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastgpt_kernels.launch import arch
from fastgpt_kernels.registry import Sizes, spec

if TYPE_CHECKING:
    from bench.cases import Case

Tensors = list[Tensor]


@dataclass(frozen=True)
class Rival:
    """`make(case)` is a function of the case's inputs; `package` must be installed."""

    name: str
    make: Callable[[Case], Callable[..., Any]]
    package: str = "torch"


@dataclass
class Provider:
    """forward(*leaves) -> outputs. If it takes other leaves than the case's inputs, `leaves` makes
    them, `dys` the gradients of its outputs, and `collect` brings results back to the op's form.
    """

    name: str
    forward: Callable[..., Any]
    leaves: Callable[[Tensors], Tensors] = lambda inputs: inputs
    dys: Callable[[Tensors], Tensors] = lambda dys: dys
    collect: Callable[[Tensors, Tensors], Tensors] = lambda outputs, grads: [*outputs, *grads]


def rivals_of(op: str) -> list[Rival]:
    return RIVALS.get(op, [TORCH_COMPILE])


def add(case: Case) -> None:
    """Add the op's rivals to a case, or to what it skips and why."""
    cuda = case.device.type == "cuda"
    for rival in rivals_of(case.op):
        if not installed(rival.package):
            case.skipped[rival.name] = "not installed"
        elif cuda:
            case.providers.append(Provider(rival.name, late(partial(rival.make, case))))
        else:
            compiled = rival is TORCH_COMPILE
            case.skipped[rival.name] = "not timed on the CPU" if compiled else "needs a GPU"
    case.providers += OTHER_WAYS.get(case.op, lambda case: [])(case)


def installed(package: str) -> bool:
    """Whether a package, or one inside of another such as "flash_attn.cute", is here."""
    try:
        return importlib.util.find_spec(package) is not None
    except ImportError:  # of the outer one
        return False


def late(make: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
    """The function that `make` returns, made at its first call."""
    made: list[Callable[..., Any]] = []

    def forward(*leaves: Tensor) -> Any:
        if not made:
            made.append(make())
        return made[0](*leaves)

    return forward


# --- torch.compile -------------------------------------------------------------------------------


def in_fp32(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets)


def compiled(case: Case) -> Callable[..., Any]:
    """Of what people compile; of a loss that is the one in fp32."""
    return torch.compile(case.bound(in_fp32 if case.owned else None), fullgraph=True)


def autotuned(case: Case) -> Callable[..., Any]:
    mode = "max-autotune-no-cudagraphs"
    return torch.compile(case.bound(), fullgraph=True, mode=mode, dynamic=False)


# --- attention -----------------------------------------------------------------------------------

SDPA = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}


def heads(x: Tensor, n_head: int) -> Tensor:
    """(B, T, C) -> (B, H, T, D)."""
    return x.unflatten(-1, (n_head, -1)).transpose(1, 2)


def flat(x: Tensor) -> Tensor:
    """(B, H, T, D) -> (B, T, C)."""
    return x.transpose(1, 2).flatten(2)


def sdpa(backend: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel([SDPA[backend]]):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def packed(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], n_head: int
) -> Callable[[Tensor], Tensor]:
    """Of packed qkv, from an attention on separate q, k and v."""
    return lambda qkv: flat(attend(*(heads(x, n_head) for x in qkv.chunk(3, dim=2))))


def kernel_alone(case: Case, backend: str) -> Provider:
    """SDPA on separate q, k, v that lie as it likes them."""
    (n_head,) = case.extras
    return Provider(
        f"SDPA {backend}, kernel alone",
        partial(sdpa, backend),
        leaves=lambda inputs: [heads(x, n_head).contiguous() for x in inputs[0].chunk(3, dim=2)],
        dys=lambda dys: [heads(dys[0], n_head).contiguous()],
        collect=lambda y, grads: [flat(y[0]), torch.cat([flat(g) for g in grads], 2)],
    )


def flex_attention(case: Case) -> Callable[..., Any]:
    """PyTorch's FlexAttention with a causal block mask, compiled as it wants to be."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    T = case.inputs[0].shape[1]
    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, T, T, device="cuda")
    return torch.compile(packed(partial(flex_attention, block_mask=mask), case.extras[0]))


def flash_attention(path: str, case: Case) -> Callable[..., Any]:
    """Of Dao's own library, on (B, T, H, D); some of its versions also return the log-sum-exp."""
    function, n_head = imported(path), case.extras[0]

    def forward(qkv: Tensor) -> Tensor:
        q, k, v = qkv.unflatten(-1, (3, n_head, -1)).unbind(2)
        y = function(q, k, v, causal=True)
        return (y[0] if isinstance(y, tuple) else y).flatten(2)

    return forward


# --- matrix products -----------------------------------------------------------------------------


class _OnLibrary(torch.autograd.Function):
    """F.linear with PyTorch's choice of BLAS library set around each product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, library: str) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.library = library
        return _with_library(library, lambda: F.linear(x, weight))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        dx, dw = _with_library(ctx.library, lambda: (dy @ weight, dy.t() @ x))
        return dx, dw, None


def _with_library(library: str, product: Callable[[], Any]) -> Any:
    before = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library(library)
    try:
        return product()
    finally:
        torch.backends.cuda.preferred_blas_library(before)


# --- other libraries -----------------------------------------------------------------------------


def imported(path: str) -> Any:
    """A library's function or class by its dotted path."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def liger_layer_norm(case: Case) -> Callable[..., Any]:
    function = imported("liger_kernel.ops.layer_norm.LigerLayerNormFunction")
    return lambda x, weight, bias: function.apply(x, weight, bias, 1e-5)


def liger_cross_entropy(case: Case) -> Callable[..., Any]:
    return case.bound(imported("liger_kernel.transformers.LigerCrossEntropyLoss")())


def quack_cross_entropy(case: Case) -> Callable[..., Any]:
    return case.bound(partial(imported("quack.cross_entropy.cross_entropy"), reduction="mean"))


def liger_linear_cross_entropy(case: Case) -> Callable[..., Any]:
    loss = imported("liger_kernel.transformers.LigerFusedLinearCrossEntropyLoss")()
    return case.bound(lambda x, weight, targets: loss(weight, x, targets))


def cut_cross_entropy(case: Case) -> Callable[..., Any]:
    return case.bound(imported("cut_cross_entropy.linear_cross_entropy"))


FA3, FA4 = "flash_attn_interface.flash_attn_func", "flash_attn.cute.flash_attn_func"
TORCH_COMPILE = Rival("torch.compile", compiled)
RIVALS: dict[str, list[Rival]] = {
    "attention": [
        Rival("SDPA flash", lambda case: packed(partial(sdpa, "flash"), *case.extras)),
        Rival("SDPA cuDNN", lambda case: packed(partial(sdpa, "cuDNN"), *case.extras)),
        Rival("FlexAttention", flex_attention),
        Rival("FA3", partial(flash_attention, FA3), "flash_attn_interface"),
        Rival("FA4", partial(flash_attention, FA4), "flash_attn.cute"),
    ],
    "layer_norm": [TORCH_COMPILE, Rival("liger-kernel", liger_layer_norm, "liger_kernel")],
    "cross_entropy": [
        TORCH_COMPILE,
        Rival("quack", quack_cross_entropy, "quack"),
        Rival("liger-kernel", liger_cross_entropy, "liger_kernel"),
    ],
    "linear_cross_entropy": [
        TORCH_COMPILE,
        Rival("liger-kernel", liger_linear_cross_entropy, "liger_kernel"),
        Rival("cut-cross-entropy", cut_cross_entropy, "cut_cross_entropy"),
    ],
}


def attentions(case: Case) -> list[Provider]:
    alone = [kernel_alone(case, name) for name in SDPA if case.device.type == "cuda"]
    return [*hopper(case), *alone]


def hopper(case: Case) -> list[Provider]:
    """Our kernels for Hopper, or why they are not in the table."""
    known, name, qkv = spec("attention"), "fastgpt, hopper", case.inputs[0]
    if qkv.device.type != "cuda":
        case.skipped[name] = "needs a GPU"
        return []
    sizes = Sizes(n_head=case.extras[0], n_embd=qkv.shape[2] // 3)
    here = arch(qkv.device.index or 0)
    if wrong := known.unsupported_reason("hopper", here, qkv.dtype, sizes):
        case.skipped[name] = wrong
        return []
    return [Provider(name, case.bound(known.implementations["hopper"].function))]


# Further ways of our own and of eager PyTorch.
OTHER_WAYS: dict[str, Callable[[Case], list[Provider]]] = {
    "attention": attentions,
    "cross_entropy": lambda case: [Provider("eager, in fp32", case.bound(in_fp32))],
}
