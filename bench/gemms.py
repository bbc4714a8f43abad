"""python -m bench gemms: the step's matrix products, cuBLAS against Inductor's max-autotune.

The linear layers and the head are where most of a step goes. Each layer's product, and the two of
its backward pass, run at a preset's own size on cuBLAS, on cuBLASLt's heuristics, and on what
`torch.compile(mode="max-autotune-no-cudagraphs")` finds among cuBLAS and Triton templates, the
persistent ones with tensor-memory access included (`fastgpt train --max_autotune=True` trains on
those), and on fastgpt's own kernel (`--op.linear=triton`). The MLP as one op, its GELU in the
products' epilogues (`--op.mlp=triton`), runs against the same of separate ops. The last lines say
what all layers of a step come to for each.
"""

from __future__ import annotations

import argparse
import functools
import gc
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastgpt_kernels as ours
from bench import kernels, provenance, results, roof, setup
from bench.kernel_cases import Case, Provider, run_oracle
from bench.setup import at_least
from bench.stats import MIN_ROUNDS
from fastgpt.config.presets import PRESETS
from fastgpt.config.schema import Config
from fastgpt_kernels import host, reference
from fastgpt_kernels.ops.matmul.configs import runs_on
from fastgpt_kernels.ops.matmul.record import eager_mlp

SIZES = ("gpt2", "gpt2_medium", "gpt2_large", "gpt2_xl")
HEAD = 50304
AUTOTUNE, NO_GPU = "max-autotune", "needs a GPU"
SMALL_TOKENS, SMALL_WIDTH, SMALL_HEAD = 96, 32, 200


def layers(config: Config, small: bool = False) -> dict[str, tuple[int, int, int, int]]:
    """Each kind of layer: (tokens of a micro-batch, features in, features out, how many)."""
    m = config.model
    M = SMALL_TOKENS if small else config.optim.batch_size * m.block_size
    C, V = (SMALL_WIDTH, SMALL_HEAD) if small else (m.n_embd, HEAD)
    return {
        "c_attn": (M, C, 3 * C, m.n_layer),
        "attn.c_proj": (M, C, C, m.n_layer),
        "c_fc": (M, C, 4 * C, m.n_layer),
        "mlp.c_proj": (M, 4 * C, C, m.n_layer),
        "lm_head": (M, C, V, 1),
    }


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


def case(name: str, M: int, K: int, N: int, device: torch.device) -> Case:
    """y (M, N) = x (M, K) @ weight (N, K).T and both gradients, by each provider."""
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    x = torch.randn(M, K, device=device).to(dtype)
    weight = (torch.randn(N, K, device=device) / K**0.5).to(dtype)
    dy = torch.randn(M, N, device=device).to(dtype)

    def linear(x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    def oracle() -> list[Tensor]:
        """The first rows and gradients in fp64; all of dW needs all rows, in pieces."""
        if M * N <= 1 << 22:
            return run_oracle(linear, [x, weight], [dy])
        dw = torch.zeros(N, K, dtype=torch.float64, device=device)
        for i in range(0, M, 4096):
            dw += dy[i : i + 4096].double().t() @ x[i : i + 4096].double()
        top = slice(0, 512)
        return [x[top].double() @ weight.double().t(), dy[top].double() @ weight.double(), dw]

    def pick(found: list[Tensor]) -> list[Tensor]:
        if M * N <= 1 << 22:
            return found
        y, dx, dw = found
        return [y[:512], dx[:512], dw]

    flops = 2.0 * M * K * N
    made = Case(
        name,
        f"{M} x {K} -> {N} {str(dtype)[6:]}",
        [x, weight],
        [dy],
        [Provider("eager", linear)],
        oracle,
        "TFLOP/s",
        {"forward": flops, "backward": 2 * flops},
        pick=pick,
    )
    if not cuda:
        made.skipped |= dict.fromkeys(("cuBLASLt", AUTOTUNE, "fastgpt"), NO_GPU)
        return made
    made.providers += [
        Provider("cuBLASLt", lambda x, w: _OnLibrary.apply(x, w, "cublaslt")),
        Provider(AUTOTUNE, _autotuned(linear)),
    ]
    _add_ours(made, ours.linear)
    return made


def _autotuned(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(fn, fullgraph=True, mode="max-autotune-no-cudagraphs", dynamic=False)


def _add_ours(case: Case, fn: Callable[..., Tensor]) -> None:
    arch = host.arch(torch.cuda.current_device())
    if runs_on(arch):
        case.providers.append(Provider("fastgpt", fn))
    else:
        case.skipped["fastgpt"] = f"{arch} has no TMA"


def mlp_case(M: int, C: int, device: torch.device) -> Case:
    """The MLP (M, C) -> (M, C), GELU and biases included, all gradients."""
    cuda = device.type == "cuda"
    dtype, H = torch.bfloat16 if cuda else torch.float32, 4 * C
    shapes = ((M, C), (H, C), (H,), (C, H), (C,), (M, C))
    x, fc, fc_bias, proj, proj_bias, dy = (torch.randn(s, device=device) for s in shapes)
    leaves = [x, fc / C**0.5, fc_bias, proj / H**0.5, proj_bias]
    leaves, dy = [t.to(dtype) for t in leaves], dy.to(dtype)
    flops = 4.0 * M * C * H
    made = Case(
        "mlp",
        f"{M} x {C} -> {H} -> {C} {str(dtype)[6:]}",
        leaves,
        [dy],
        [Provider("eager", eager_mlp)],
        lambda: run_oracle(reference.mlp, leaves, [dy]),
        "TFLOP/s",
        {"forward": flops, "backward": 2 * flops},
    )
    if not cuda:
        made.skipped |= dict.fromkeys(("cuBLAS, fused GELU", AUTOTUNE, "fastgpt"), NO_GPU)
        return made
    fused = functools.partial(eager_mlp, bias_gelu=ours.bias_gelu)
    made.providers += [
        Provider("cuBLAS, fused GELU", fused),
        Provider(AUTOTUNE, _autotuned(eager_mlp)),
    ]
    _add_ours(made, ours.mlp)
    return made


def totals(rows: list[dict[str, Any]], counts: dict[str, int]) -> list[tuple[str, float]]:
    """(provider, ms of all layers of a step), best first; only providers with every time."""
    out = {}
    for provider in dict.fromkeys(row["provider"] for row in rows):
        own = [row for row in rows if row["provider"] == provider]
        if all("median_ms" in row for row in own):
            out[provider] = sum(row["median_ms"] * counts[row["op"]] for row in own)
    best: dict[tuple[str, str], float] = {}
    for row in rows:
        if "median_ms" in row:
            key = row["op"], row["pass"]
            best[key] = min(best.get(key, float("inf")), row["median_ms"])
    out["the best of each"] = sum(ms * counts[op] for (op, _), ms in best.items())
    return sorted(out.items(), key=lambda item: item[1])


def main(argv: list[str]) -> int:
    parser = setup.parser("gemms", __doc__)
    parser.add_argument("sizes", nargs="*", help=f"of {', '.join(SIZES)}; default: gpt2")
    parser.add_argument(
        "--rounds", type=at_least(MIN_ROUNDS), default=30, help="timings of each provider"
    )
    parser.add_argument(
        "--without-autotune", action="store_true", help="leave out Inductor's search: minutes"
    )
    gpu = torch.cuda.is_available()
    setup.add_out(parser)
    args = parser.parse_args(argv)
    if unknown := [s for s in args.sizes if s not in SIZES]:
        parser.error(f"no size {unknown[0]!r}: there are {', '.join(SIZES)}")
    device = torch.device("cuda", 0) if gpu else torch.device("cpu")
    if gpu:
        torch._inductor.config.triton.enable_persistent_tma_matmul = True
    else:
        print("no GPU: tiny products on the CPU show that this runs; times mean nothing")
    with setup.one_thread(device):
        return run(args, device, argv)


def run(args: argparse.Namespace, device: torch.device, argv: list[str]) -> int:
    """Measure, show and save what `main` was asked for."""
    gpu = device.type == "cuda"
    roofs = roof.measure(device)
    result = results.Result("gemms", argv, {"rounds": args.rounds, "roofs": roofs})
    print(" · ".join([provenance.device_name(), *(f"{v:,.1f} {k}" for k, v in roofs.items())]))
    for size in args.sizes or SIZES[:1]:
        rows: list[dict[str, Any]] = []
        shapes = layers(PRESETS[size](), small=not gpu)
        cases = {
            name: functools.partial(case, name, M, K, N, device)
            for name, (M, K, N, _) in shapes.items()
        }
        cases["mlp"] = functools.partial(mlp_case, *shapes["c_fc"][:2], device)
        for make in cases.values():
            torch.manual_seed(0)
            made = make()
            if args.without_autotune:
                made.skipped[AUTOTUNE] = "left out"
                made.providers = [p for p in made.providers if p.name != AUTOTUNE]
            found = kernels.measure(made, device, args.rounds)
            for row in found:
                row["key"] = " | ".join((size, row["op"], row["pass"], row["provider"]))
                row["preset"] = size
                if "rate" in row:
                    row["share_of_roof"] = row["rate"] / roofs[row["unit"]]
            kernels.show(found)
            rows += found
            result.rows.extend(found)
            result.save(args.out)
            gc.collect()
            torch._dynamo.reset()
            if gpu:
                torch.cuda.empty_cache()
        print(f"\n{size}, all layers of a micro-batch, forward and backward")
        layers_only = [row for row in rows if row["op"] in shapes]
        for provider, ms in totals(layers_only, {name: n for name, (*_, n) in shapes.items()}):
            print(f"  {provider:28} {ms:9.3f} ms")
    if path := result.finish(args.out):
        print(f"written: {path}")
    return 0
