"""The training step on fake CUDA tensors: every launch of it, without a GPU.

`record(Request(...))` runs this module in a process of its own and returns a `Step`. Compiled
graphs are read from Inductor's schedule (`bench/fake_cuda.py`); ops of ours that stand in them are
run on meta tensors, and their launches recorded from Triton's JIT; what PyTorch launches between
them, the clipping, the optimizer and the adding up of gradients, is seen by a dispatch mode.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from bench import fake_cuda
from bench.fake_cuda import FakeGpu, Graph, Launch
from fastgpt.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Request:
    """A preset with flags, and whose model: ours, or a nanoGPT checkout's."""

    preset: str
    flags: dict[str, str] = field(default_factory=dict)
    peer_path: str = ""
    gpu: FakeGpu = FakeGpu()


@dataclass(frozen=True)
class Step:
    """What a step launches: both graphs once a micro-batch, and the rest of the whole step, with
    the graphs that the optimizer has."""

    forward: list[Launch]
    backward: list[Launch]
    rest: list[Launch]
    choices: list[str]


def record(*requests: Request) -> list[Step]:
    """The launches of steps on one GPU, found in a process of its own. Raises UserError."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "-m", "bench.fake_step"],
        input=json.dumps([asdict(r) for r in requests]),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"},
    )
    if done.returncode == 2:
        raise UserError(done.stderr.strip().splitlines()[-1])
    if done.returncode:
        raise RuntimeError(f"the step on fake tensors failed:\n{done.stderr[-4000:]}")
    return [_step(found) for found in json.loads(done.stdout.splitlines()[-1])]


def _step(found: dict[str, Any]) -> Step:
    lists = {k: [_launch(x) for x in v] for k, v in found.items() if k != "choices"}
    return Step(**lists, choices=found["choices"])


def _launch(fields: dict[str, Any]) -> Launch:
    return Launch(**_with_tuples(fields))


def _with_tuples(fields: dict[str, Any]) -> dict[str, Any]:
    """What JSON made lists of, as tuples again."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}


def main() -> int:
    requests = [_request(given) for given in json.load(sys.stdin)]
    try:
        fake_cuda.pretend(requests[0].gpu)
        steps = [_record(request) for request in requests]
    except UserError as e:
        print(e, file=sys.stderr)
        return 2
    print(json.dumps([asdict(step) for step in steps]))
    return 0


def _request(given: dict[str, Any]) -> Request:
    return Request(**{**given, "gpu": FakeGpu(**_with_tuples(given["gpu"]))})


def _record(request: Request) -> Step:
    import torch
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    from torch.utils import _foreach_utils

    from bench import setup, variants
    from bench.dispatched import Dispatched
    from fastgpt.model import ops
    from fastgpt.model.gpt import GPT, ModelShape

    ops.CHECKED_ON = ()  # type: ignore[assignment]  # nothing can be run here
    GPT.init_weights = lambda self, seed: self  # type: ignore[method-assign]
    _foreach_utils._foreach_supported_types.append(FakeTensor)
    # Fake tensors cannot move.
    torch.nn.Module.to = lambda self, *a, **k: self  # type: ignore[method-assign]
    flags = {"device": "cuda:0", "compile": "True", **request.flags}
    config = setup.preset_of(request.preset, flags)
    vocab_size = setup.vocabulary(config)
    kind = variants.PEER if request.peer_path else "ours"
    variant = variants.Variant("step", {}, kind, path=request.peer_path)
    torch._dynamo.reset()
    seen = Dispatched()
    with fake_cuda.captured(seen.paused) as graphs, FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda:0"):
            stepper = variants.build(variant, config, vocab_size)
        rows = config.optim.rows, config.model.block_size + 1
        tokens = torch.empty(rows, dtype=torch.int64, device="cuda:0")
        stepper.warm_up(tokens[: config.optim.batch_size])
        stepper.step(0, tokens)  # makes the optimizer's state
        with seen:
            stepper.step(1, tokens)
    arch = "sm_{}{}".format(*request.gpu.capability)
    sizes = ModelShape.of(config.model, vocab_size).sizes(config.optim.batch_size)
    once = [g for g in graphs if g.once_a_step]
    graphs = [g for g in graphs if not g.once_a_step]
    return Step(
        [x for g in graphs if not g.backward for x in parts(g, arch, sizes)],
        [x for g in graphs if g.backward for x in parts(g, arch, sizes)],
        [x for g in once for x in g.launches] + seen.launches,
        list(stepper.choices),
    )


def parts(graph: Graph, arch: str, sizes: Any) -> Iterator[Launch]:
    """A graph's launches; those that are ops of ours in their single kernels and products."""
    for place, launch in enumerate(graph.launches):
        if place in graph.calls:
            yield from _own(launch, *graph.calls[place], arch=arch, sizes=sizes)
        elif launch.what.startswith("_scaled_dot_product"):
            yield replace(launch, flops=_flops("attention", launch, sizes))
        else:
            yield launch


def _own(launch: Launch, name: str, *args: Any, arch: str, sizes: Any) -> Iterator[Launch]:
    """What an op of ours launches: Triton kernels, and PyTorch's products and passes."""
    from bench.dispatched import Dispatched
    from fastgpt_kernels import register
    from fastgpt_kernels.tools import launches

    with launches.recording(arch) as kernels, Dispatched() as seen:
        register.registered[name].forward(*args)
    for part in seen.launches:
        yield replace(part, ops=(f"fastgpt.{name}",), lines=launch.lines)
    multiply = [k for k in kernels if "tl.dot" in launches.source(k.kernel)]
    for kernel in kernels:
        flops = _flops(name, launch, sizes) // len(multiply) if kernel in multiply else 0
        what = kernel.kernel.fn.__name__.removesuffix("_kernel")
        moved = max(kernel.moved, (launch.reads + launch.writes) * (len(kernels) == 1))
        ops, roof = (f"fastgpt.{name}",), _roofs(arch).get(kernel.key, 0.0)
        yield Launch(what, moved, 0, flops, ops=ops, lines=launch.lines, roof=roof)


def _flops(name: str, launch: Launch, sizes: Any) -> int:
    """Of the products that have to be computed: attention's formula counts masked scores too."""
    from fastgpt_kernels.registry import spec_of

    op = spec_of(name)
    if op.name != "attention":
        return launch.flops
    backward = "backward" in name + launch.what
    return int(op.cost(sizes, 2)["backward" if backward else "forward"].flops)


@functools.cache
def _roofs(arch: str) -> dict[str, float]:
    """By a kernel's key: the share of the roof that its machine code allows, from the baselines."""
    from fastgpt_kernels.specs import spec_modules
    from fastgpt_kernels.tools import baseline, bound

    device = next((name for name, d in bound.DEVICES.items() if d.arch == arch), "")
    found = {}
    for module in spec_modules():
        for archs in baseline.read(baseline.path(module)).values():
            entries = archs.get(arch, {})
            for e in entries.values() if isinstance(entries, dict) else ():
                if device in e:
                    found[e["key"]] = e[device][1]
    return found


if __name__ == "__main__":
    sys.exit(main())
