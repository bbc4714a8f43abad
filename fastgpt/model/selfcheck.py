"""Does a fused op agree with the eager one on this device? Asked once, before a run relies on it.

A kernel that was right on another GPU or with another compiler can be wrong here. Forward and every
gradient of a small, odd-sized case are compared with the eager op in fp32, in well under a second
besides compilation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

# Relative error (Frobenius norm) that rounding explains: inputs and results of 8, 11 and 24 bits.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-4}


def _case(op: str, device: torch.device, head_dim: int) -> tuple[list[Tensor], dict]:
    """Differentiable fp32 inputs of an op, and its other arguments."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    width = 3 * head_dim
    if op == "attention":
        return [random(2, 150, 3 * width)], {"n_head": 3}
    if op == "layer_norm":
        return [random(37, width), random(width), random(width)], {}
    if op == "add_layer_norm":
        return [random(37, width), random(37, width), random(width), random(width)], {}
    if op == "bias_gelu":
        return [random(37, width), random(width)], {}
    if op in ("linear", "mlp"):  # more than a tile of rows, and of the wider side
        fc, proj = random(392, 136) / 136**0.5, random(136, 392) / 392**0.5
        layers = [fc, random(392)] if op == "linear" else [fc, random(392), proj, random(136)]
        return [random(300, 136), *layers], {}
    if op == "adamw":
        return [random(37, width), random(5000), random(1)], {}
    targets = torch.randint(300, (77,), generator=generator)
    targets[5] = -1
    inputs = [random(77, width), random(384, width) * 0.1]
    return inputs, {"targets": targets.to(device), "vocab_size": 300}


def _run(function: Callable, inputs: list[Tensor], arguments: dict) -> list[Tensor]:
    """Results and gradients in fp32, all results weighed by fixed random numbers."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = function(*leaves, **arguments)
    outs = list(out) if isinstance(out, tuple) else [out]
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(o.shape, generator=generator).to(o) for o in outs]
    torch.autograd.backward(outs, weights)
    return [t.detach().float() for t in (*outs, *(x.grad for x in leaves if x.grad is not None))]


def _run_optimizer(make: Callable, inputs: list[Tensor], arguments: dict) -> list[Tensor]:
    """Parameters and moments after three steps, clipped, and a fourth that is called off."""
    params = [x.float().clone().requires_grad_() for x in inputs]
    groups = [
        {"params": params[:1], "weight_decay": 0.1},
        {"params": params[1:], "weight_decay": 0.0},
    ]
    optimizer = make(groups, lr=0.0, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(2)
    for step in range(4):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (step + 1)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p)
        optimizer.grad_scale = torch.tensor(1.0 + step, device=params[0].device)
        optimizer.found_inf = torch.tensor(float(step == 3), device=params[0].device)
        optimizer.step()
    moved = [(p - x.float()).detach() for p, x in zip(params, inputs, strict=True)]
    return [*moved, *(s[k] for s in optimizer.state.values() for k in ("exp_avg", "exp_avg_sq"))]


@contextlib.contextmanager
def _exact_matmuls() -> Iterator[None]:
    """fp32 products in fp32: TF32 would put the yardstick itself off by 1e-3."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def disagreement(
    op: str,
    function: Callable,
    eager: Callable,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
) -> str:
    """What is wrong with `function` against `eager`; empty where they agree."""
    inputs, arguments = _case(op, device, head_dim)
    run: Callable[..., list[Tensor]] = _run
    if op == "adamw":  # of fp32 masters, whatever the activations are
        run, dtype = _run_optimizer, torch.float32
    rounded = [x.to(dtype) for x in inputs]
    with torch.enable_grad():
        return difference(
            lambda: run(function, rounded, arguments),
            lambda: run(eager, [x.float() for x in rounded], arguments),
            dtype,
        )


def difference(
    computed: Callable[[], list[Tensor]], exact: Callable[[], list[Tensor]], dtype: torch.dtype
) -> str:
    """What is wrong with computed() in `dtype` against exact() in fp32; empty where they agree."""
    with _exact_matmuls():
        want = exact()
        try:
            got = computed()
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as e:
            line = (str(e).strip().splitlines() or [type(e).__name__])[0]
            return f"does not run here ({line[:160]})"
    for g, w in zip(got, want, strict=True):
        error = ((g.float() - w).norm() / w.norm()).item()
        if not error <= TOLERANCE[dtype]:
            return f"is off by {error:.2g} here"
    return ""
