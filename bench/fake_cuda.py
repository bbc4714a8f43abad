"""PyTorch made to believe in a CUDA GPU that is not here, and what it would launch there.

    pretend(FakeGpu())
    with captured() as graphs, FakeTensorMode():
        torch.compile(model)(tokens).backward()          # tensors of device "cuda"

Dynamo, AOTAutograd and Inductor run as they do on a GPU; Inductor's code is scheduled and written,
and not run. What it would launch is read from its scheduler: each kernel with the buffers that it
reads and writes. It patches PyTorch for good, so it belongs in a process of its own.

A build of PyTorch without CUDA has no device guard for it: `guard.cpp` is compiled into the user's
cache folder, which takes a C++ compiler and ten seconds, once. A build with CUDA has its own, which
asks the driver, and so needs a GPU here, of any kind.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import hashlib
import importlib.metadata
import importlib.util
import math
import os
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastgpt.errors import UserError


@dataclass(frozen=True)
class FakeGpu:
    """What PyTorch and Inductor ask a device for."""

    name: str = "NVIDIA H100 80GB HBM3"
    capability: tuple[int, int] = (9, 0)
    multiprocessors: int = 132
    memory: int = 80 << 30
    l2: int = 50 << 20


@dataclass(frozen=True)
class Launch:
    """A kernel that would be launched, or an op of ours that launches its own (`fake_step.parts`).

    what    the kernel or library function; "triton" for one that Inductor writes
    reads, writes  bytes, each tensor once
    flops   of matrix products
    shape   of the product, M N K
    ops     the ATen ops in it
    lines   of the model that they are from: "gpt.py:95"
    roof    share of the roof that its machine code allows; 0: not a kernel of ours
    """

    what: str
    reads: int
    writes: int
    flops: int = 0
    shape: tuple[int, ...] = ()
    ops: tuple[str, ...] = ()
    lines: tuple[str, ...] = ()
    roof: float = 0.0


@dataclass
class Graph:
    """A compiled graph, forward or backward; `calls` has the arguments of ops of ours by place."""

    backward: bool
    launches: list[Launch] = field(default_factory=list)
    calls: dict[int, tuple[Any, ...]] = field(default_factory=dict)

    @property
    def once_a_step(self) -> bool:
        """Whether it runs once a step, not once a micro-batch."""
        files = {line.partition(":")[0] for x in self.launches for line in x.lines}
        return not files.isdisjoint(("muon.py", "verdict.py"))


def _guard() -> None:
    """Load the device guard that a build of PyTorch without CUDA lacks.

    Before PyTorch: it asks once whether there are CUDA hooks, and keeps the answer.
    """
    found = importlib.util.find_spec("torch")
    assert found is not None and found.origin is not None
    root = Path(found.origin).parent
    if (root / "lib" / "libtorch_cuda.so").exists():
        return
    source = Path(__file__).with_name("guard.cpp")
    version = importlib.metadata.version("torch")
    key = hashlib.sha256(source.read_bytes() + version.encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fastgpt"
    library = cache / f"guard-{key}.so"
    if not library.exists():
        compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
        if compiler is None:
            raise UserError(
                "this build of PyTorch has no CUDA, and its stand-in needs a C++ compiler: "
                "install g++, or a PyTorch with CUDA"
            )
        cache.mkdir(parents=True, exist_ok=True)
        new = library.with_suffix(f".{os.getpid()}.tmp")
        lib = root / "lib"
        flags = ["-shared", "-fPIC", "-O0", "-std=c++20", f"-I{root / 'include'}", f"-L{lib}"]
        flags += ["-lc10", "-ltorch_cpu", f"-Wl,-rpath,{lib}"]
        command = [compiler, str(source), "-o", str(new), *flags]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"{source.name} does not compile: {done.stderr.strip()[:300]}")
        new.replace(library)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL).set_guard()


def _answering(value: Any) -> Any:
    """A function of its own for every name: Dynamo has rules for functions."""
    return lambda *args, **kwargs: value


def _with_flash(attention: Any) -> Any:
    """PyTorch's attention, which takes flash on a GPU; a build without CUDA knows but its math."""
    import torch

    flash = torch.ops.aten._scaled_dot_product_flash_attention

    def attend(
        query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, **more: Any,
    ) -> Any:  # fmt: skip
        if attn_mask is None and query.dtype.itemsize == 2 and not more:
            return flash(query, key, value, dropout_p, is_causal, scale=scale)[0]
        rest = attn_mask, dropout_p, is_causal
        return attention(query, key, value, *rest, scale=scale, **more)

    return attend


def pretend(gpu: FakeGpu) -> None:
    """From now on this process has `gpu`, on which nothing can run. Raises UserError.

    Call it before PyTorch is imported.
    """
    if "torch" in sys.modules:
        raise RuntimeError("fake_cuda.pretend comes before `import torch`")
    _guard()
    import torch

    if torch.version.cuda and not torch.cuda.device_count():
        raise UserError(
            "this build of PyTorch has CUDA, which wants a real GPU here to start: it takes one of "
            "any kind, or an environment with PyTorch's CPU build"
        )
    from torch.utils import _triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    properties = types.SimpleNamespace(
        name=gpu.name, type="cuda", major=gpu.capability[0], minor=gpu.capability[1],
        multi_processor_count=gpu.multiprocessors, total_memory=gpu.memory, warp_size=32,
        L2_cache_size=gpu.l2, regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048,
        max_threads_per_block=1024, shared_memory_per_block=48 << 10, gcnArchName="",
        shared_memory_per_block_optin=227 << 10, shared_memory_per_multiprocessor=228 << 10,
    )  # fmt: skip
    answers: dict[str, Any] = {
        "is_available": True, "device_count": 1, "current_device": 0, "is_initialized": False,
        "get_device_properties": properties, "get_device_capability": gpu.capability,
        "get_device_name": gpu.name, "is_bf16_supported": True, "_is_compiled": True,
        "is_current_stream_capturing": False, "memory_allocated": 0, "max_memory_allocated": 0,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8), "get_rng_state_all": [],
        "mem_get_info": (gpu.memory, gpu.memory), "memory_reserved": 0,
    }  # fmt: skip
    answers |= dict.fromkeys(
        ("synchronize", "init", "_lazy_init", "set_rng_state", "set_rng_state_all", "manual_seed",
         "manual_seed_all", "reset_peak_memory_stats", "empty_cache")
    )  # fmt: skip
    for name, value in answers.items():
        setattr(torch.cuda, name, _answering(value))
    torch.cuda.device = torch.cuda.stream = lambda *a: contextlib.nullcontext()  # type: ignore
    torch.cuda.random._lazy_init = _answering(None)  # type: ignore[attr-defined]
    torch.version.cuda = torch.version.cuda or "13.0"
    for name, value in {
        "_cuda_getCurrentRawStream": 0, "_cuda_getDevice": 0, "_cuda_setDevice": None,
        "_cuda_exchangeDevice": 0, "_cuda_maybeExchangeDevice": 0, "_cuda_getDeviceCount": 1,
        "_cuda_isCurrentStreamCapturing": False, "_cuda_emptyCache": None,
    }.items():  # fmt: skip
        setattr(torch._C, name, _answering(value))
    from torch.nn import functional

    functional.scaled_dot_product_attention = _with_flash(functional.scaled_dot_product_attention)
    for name in ("has_triton", "has_triton_package"):
        setattr(_triton, name, _answering(True))
    target = GPUTarget("cuda", 10 * gpu.capability[0] + gpu.capability[1], 32)
    driver.set_active(
        types.SimpleNamespace(
            get_current_target=lambda: target,
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
        )
    )


class _Written(BaseException):  # Inductor wraps what is an Exception
    """Inductor has written its code, which cannot be run here."""


@contextlib.contextmanager
def captured(
    inside: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
) -> Iterator[list[Graph]]:
    """The graphs that torch.compile makes within, as they are made; `inside` is around a run."""
    from torch import fx
    from torch._functorch import config as functorch_config
    from torch._inductor import compile_fx, config
    from torch._inductor.fx_passes import fuse_attention, misc_patterns, pad_mm
    from torch._inductor.graph import GraphLowering

    graphs: list[Graph] = []

    def compile_to_module(self: GraphLowering) -> Any:
        self.codegen()
        graphs.append(graph := Graph(bool(self.is_backward)))
        for node in self.scheduler.nodes:
            if not _is_free(node):
                if call := _own_call(node):
                    graph.calls[len(graph.launches)] = call
                graph.launches.append(_launch(node))
        raise _Written

    def inner(gm: Any, example_inputs: Any, **options: Any) -> Any:
        """Inductor schedules, and the graph itself runs on fake tensors."""
        run = fx.GraphModule(gm, copy.copy(gm.graph))
        with contextlib.suppress(_Written):
            compile_inner(gm, example_inputs, **options)

        def boxed(args: list[Any]) -> Any:
            given = list(args)
            args.clear()
            with inside():
                return run(*given)

        boxed._boxed_call = True  # type: ignore[attr-defined]
        return boxed

    def compile_graph(gm: Any, example_inputs: Any, **options: Any) -> Any:
        return compile(gm, example_inputs, **{**options, "inner_compile": inner})

    # These passes trace their patterns on a device that computes.
    for module, name in ((fuse_attention, "_sfdp_init"), (pad_mm, "_pad_mm_init"),
                         (misc_patterns, "_misc_patterns_init")):  # fmt: skip
        setattr(module, name, lambda *a, **k: None)
    config.joint_graph_constant_folding = False
    compile, compile_inner = compile_fx.compile_fx, compile_fx.compile_fx_inner
    lower = GraphLowering._compile_to_module
    compile_fx.compile_fx = compile_graph  # type: ignore[assignment]
    GraphLowering._compile_to_module = compile_to_module  # type: ignore[method-assign]
    try:
        with (
            config.patch(fx_graph_cache=False, compile_threads=1),
            functorch_config.patch(enable_autograd_cache=False),
        ):
            yield graphs
    finally:
        compile_fx.compile_fx = compile
        GraphLowering._compile_to_module = lower  # type: ignore[method-assign]


def _is_free(node: Any) -> bool:
    """One result of several that an op has, or a view: nothing is launched for it."""
    from torch._inductor import ir

    inner = node.get_nodes()[0].node
    return isinstance(inner, ir.MultiOutput | ir.NopKernel) or type(node).__name__.startswith("Nop")


def _own_call(node: Any) -> tuple[Any, ...] | None:
    """(name, arguments) of an op of ours, tensors on the meta device; None for all else."""
    import torch
    from torch.utils import _pytree

    kernel = node.get_nodes()[0].node
    op = getattr(kernel, "op_overload", None)
    if not node.is_extern() or getattr(op, "namespace", "") != "fastgpt":
        return None
    fx = next(n for n in kernel.get_origins() if n.target is op)

    def on_meta(x: Any) -> Any:
        value = x.meta.get("val") if isinstance(x, torch.fx.Node) else x
        if not isinstance(value, torch.Tensor):
            return value
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")

    return fx.target._schema.name.partition("::")[2], *_pytree.tree_map(on_meta, list(fx.args))


def _launch(node: Any) -> Launch:
    parts = node.get_nodes()
    fx = [n for part in parts if part.node is not None for n in part.node.get_origins()]
    what, flops = "triton", 0
    shape: tuple[int, ...] = ()
    if node.is_extern():
        kernel = parts[0].node
        what = getattr(kernel, "python_kernel_name", None) or type(kernel).__name__
        flops = node.estimate_flops() or 0
        if "mm" in what:  # not all of which it can tell the FLOPs of
            a, b = ([*map(int, x.get_size())] for x in kernel.inputs[-2:])
            shape = (a[-2], b[-1], a[-1])
            flops = 2 * math.prod(a) * b[-1]
    return Launch(
        what.removeprefix("torch.ops.").removeprefix("aten.").removesuffix(".default"),
        int(node.get_read_buffer_sizes()),
        int(node.get_write_buffer_sizes()),
        int(flops),
        shape,
        tuple(dict.fromkeys(str(n.target).removeprefix("aten.") for n in fx)),
        tuple(dict.fromkeys(filter(None, (_line(n) for n in fx)))),
    )


def _line(fx: Any) -> str:
    """The innermost line of the model that an op is from."""
    frames = (fx.meta.get("stack_trace") or "").strip().splitlines()
    places = [line.strip() for line in frames if line.strip().startswith("File ")]
    own = [p for p in places if "/fastgpt/" in p or "/model.py" in p]
    if not own:
        return ""
    parts = own[-1].split('"')
    number = parts[2].split("line ")[1].split(",")[0]
    return f"{Path(parts[1]).name}:{number}"
