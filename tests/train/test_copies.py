"""Copies of the linear layers' weights: the same training, to the bit, and no pass rounds them."""

from __future__ import annotations

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from fastgpt.config.presets import laptop
from fastgpt.config.settings import replace
from fastgpt.model.device import Machine
from fastgpt.model.gpt import GPT, ModelShape
from fastgpt.model.kernels import KernelOptions, Kernels, Selected, select
from fastgpt.train import optim
from fastgpt.train.trainer import Trainer

CPU, FP32 = torch.device("cpu"), torch.float32
SHAPE = ModelShape(2, 2, 32, 16, 50, bias=True)


def trainer(dtype: str, table: Kernels | None = None) -> Trainer:
    changes = {"batch_size": 4, "gradient_accumulation_steps": 2}
    config = replace(laptop(), kernels="eager", **changes)
    machine = Machine(CPU, dtype)
    table = table or select(CPU, options=KernelOptions("eager"))
    return Trainer(GPT(SHAPE, 0.0, table, machine.torch_dtype).init_weights(0), config, machine)


def tokens(step: int = 0) -> Tensor:
    return torch.randint(50, (8, 17), generator=torch.Generator().manual_seed(step))


def follow(model: GPT) -> bool:
    return all(torch.equal(copy, p.to(copy.dtype)) for p, copy in model.weight_copies().items())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_trains_as_without_them(dtype, monkeypatch):
    ours = trainer(dtype)
    monkeypatch.setattr(GPT, "make_weight_copies", lambda model: None)
    plain = trainer(dtype)
    assert len(ours.model.weight_copies()) == 8 and not plain.model.weight_copies()
    for step in range(4):
        a, b = (t.step(step, tokens(step)) for t in (ours, plain))
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
        assert follow(ours.model)
    assert torch.equal(ours.losses(tokens(9)), plain.losses(tokens(9)))
    saved = ours.model.state_dict()
    assert saved.keys() == plain.model.state_dict().keys()
    for name, p in plain.model.named_parameters():
        assert torch.equal(saved[name], p) and p.dtype == torch.float32, name


def test_follow_what_is_loaded():
    a, b = trainer("bfloat16"), trainer("bfloat16")
    a.step(0, tokens())
    b.load(a.model.state_dict(), optim.state_tensors(a.optimizer, a.model), a.state_dict())
    assert follow(b.model)
    assert torch.equal(a.step(1, tokens(1))[0], b.step(1, tokens(1))[0])


def test_what_has_a_copy():
    """The matrices of the blocks, and the head's if its op takes a copy."""
    assert not trainer("float32").model.weight_copies()

    def copied(implementation: str) -> set[str]:
        choice = Selected("linear_cross_entropy", implementation, "")
        model = GPT(SHAPE, 0.0, Kernels({}, (choice,)), torch.bfloat16)
        model.make_weight_copies()
        names = {p: n for n, p in model.named_parameters()}
        return {names[p] for p in model.weight_copies()}

    blocks = {n for n, _ in trainer("float32").model.named_parameters() if ".c_" in n}
    assert copied("eager") == {n for n in blocks if n.endswith("weight")}
    assert copied("triton") == copied("eager") | {"transformer.wte.weight"}


def test_the_compiled_step_rounds_no_weight(monkeypatch):
    """In one graph, as on a GPU; without copies 8. The head's are rounded inside its op."""

    def rounded() -> list[tuple[int, ...]]:
        """Shapes of the matrices among the graph's inputs that are rounded in it."""
        t, shapes = trainer("bfloat16"), []

        def look(graph: torch.fx.GraphModule, inputs: list[Tensor]):
            for node in graph.graph.nodes:
                cast = node.target == torch.ops.aten._to_copy.default
                if cast and node.args[0].op == "placeholder" and node.meta["val"].dtype != FP32:
                    shapes.append(tuple(node.meta["val"].shape))
            return make_boxed_func(graph.forward)

        torch._dynamo.reset()
        t.forward = torch.compile(t.model, backend=aot_autograd(fw_compiler=look), fullgraph=True)
        assert torch.isfinite(t.step(0, tokens())[0]) and follow(t.model)
        return [shape for shape in shapes if len(shape) == 2]

    assert rounded() == []
    monkeypatch.setattr(GPT, "make_weight_copies", lambda model: None)
    assert len(rounded()) == 8
