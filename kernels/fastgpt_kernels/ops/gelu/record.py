"""What GELU tells the rest of the program."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from fastgpt_kernels.ops.gelu.op import bias_gelu
from fastgpt_kernels.registry import (
    Cost,
    ExampleInputs,
    Implementation,
    OpSpec,
    Random,
    Sizes,
    triton_unsupported,
)


def eager(x: Tensor, bias: Tensor | None = None, approximate: str = "tanh") -> Tensor:
    """gelu(x + bias); approximate: "tanh" (GPT-2) or "none" (erf)."""
    return F.gelu(x if bias is None else x + bias.to(x.dtype), approximate=approximate)


def _examples(s: Sizes, random: Random) -> list[ExampleInputs]:
    inputs = [random(s.tokens, 4 * s.n_embd), random(4 * s.n_embd) if s.bias else None]
    return [ExampleInputs(inputs, {"approximate": s.approximate}, fp32_inputs=(1,))]


def _cost(s: Sizes, itemsize: int) -> dict[str, Cost]:
    moved = 4.0 * s.tokens * s.n_embd * itemsize
    return {"forward": Cost(0, 2 * moved), "backward": Cost(0, 3 * moved)}


SPECS = {
    "bias_gelu": OpSpec(
        "bias_gelu",
        {
            "eager": Implementation(eager),
            "triton": Implementation(bias_gelu, triton_unsupported),
        },
        _examples, _cost,
        kernels=tuple(f"bias_gelu_{kernel}_kernel" for kernel in ("forward", "backward", "sum")),
        category="memory", label="GELU", calls_per_step=12,
    )
}  # fmt: skip
