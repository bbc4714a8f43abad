"""What GELU tells the rest of the program."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from fastgpt_kernels.ops.gelu.op import bias_gelu
from fastgpt_kernels.record import Case, Random, Record, Sizes, Work


def eager(x: Tensor, bias: Tensor | None = None, approximate: str = "tanh") -> Tensor:
    """gelu(x + bias); approximate: "tanh" (GPT-2) or "none" (erf)."""
    return F.gelu(x if bias is None else x + bias.to(x.dtype), approximate=approximate)


def _case(s: Sizes, random: Random) -> Case:
    return Case([random(s.tokens, 4 * s.n_embd), random(4 * s.n_embd)])


def _calls(s: Sizes, random: Random) -> list[Case]:
    x, bias = _case(s, random).inputs
    return [Case([x, bias if s.bias else None], {"approximate": s.approximate}, masters=(1,))]


def _work(s: Sizes, itemsize: int) -> dict[str, Work]:
    moved = 4.0 * s.tokens * s.n_embd * itemsize
    return {"forward": Work(0, 2 * moved), "backward": Work(0, 3 * moved)}


RECORDS = {
    "bias_gelu": Record(
        "bias_gelu", {"eager": eager, "triton": bias_gelu}, _case, _work,
        kernels=tuple(f"bias_gelu_{kernel}_kernel" for kernel in ("forward", "backward", "sum")),
        part="memory", item="GELU", calls=_calls, often=12,
    )
}  # fmt: skip
