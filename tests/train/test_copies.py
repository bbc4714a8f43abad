"""Copies of the linear layers' masters: the same training, to the bit, and no pass rounds them."""

from __future__ import annotations

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from fastgpt.config.presets import laptop
from fastgpt.config.settings import replace
from fastgpt.model import ops
from fastgpt.model.device import Machine
from fastgpt.model.gpt import GPT, ModelShape
from fastgpt.model.ops import Choice, OpTable, Wish
from fastgpt.train import optim
from fastgpt.train.trainer import Trainer

CPU, FP32 = torch.device("cpu"), torch.float32
SHAPE = ModelShape(2, 2, 32, 16, 50, bias=True)


def trainer(dtype: str, table: OpTable | None = None) -> Trainer:
    changes = {"batch_size": 4, "gradient_accumulation_steps": 2}
    config = replace(laptop(), kernels="eager", **changes)
    machine = Machine(CPU, dtype)
    table = table or ops.choose(CPU, wish=Wish("eager"))
    return Trainer(GPT(SHAPE, 0.0, table, machine.torch_dtype).init_weights(0), config, machine)


def tokens(step: int = 0) -> Tensor:
    return torch.randint(50, (8, 17), generator=torch.Generator().manual_seed(step))


def follow(model: GPT) -> bool:
    return all(torch.equal(copy, p.to(copy.dtype)) for p, copy in model.copies().items())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_trains_as_without_them(dtype, monkeypatch):
    ours = trainer(dtype)
    monkeypatch.setattr(GPT, "keep_copies", lambda model: None)
    plain = trainer(dtype)
    assert len(ours.model.copies()) == 16 and not plain.model.copies()
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


def test_only_what_an_eager_op_would_round():
    assert not trainer("float32").model.copies()
    model = trainer("bfloat16").model

    def copied(**implementations: str) -> set[str]:
        """Layers and parameters of a block of which there are copies, by ops' implementations."""
        ops = ("linear", "mlp", "bias_gelu", "add_layer_norm")
        chosen = dict.fromkeys(ops, "eager") | implementations
        table = OpTable({}, tuple(Choice(op, i, "") for op, i in chosen.items()))
        other = GPT(SHAPE, 0.0, table, torch.bfloat16)
        other.keep_copies()
        names = {p: n for n, p in other.named_parameters()}
        return {names[p].removeprefix("transformer.h.1.") for p in other.copies()}

    block = {n for n, _ in model.transformer.h[1].named_parameters() if ".c_" in n}
    assert {n for n in copied() if "transformer" not in n} == block
    assert copied(linear="triton") == {"transformer.wte.weight"}  # the head's
    assert not any("mlp." in name for name in copied(mlp="triton"))
    assert block - copied(bias_gelu="triton") == {"mlp.c_fc.bias"}
    ends = {"attn.c_proj.bias", "mlp.c_proj.bias"}
    assert block - copied(add_layer_norm="triton") == ends


def test_the_compiled_step_rounds_no_parameter(monkeypatch):
    """In one graph, as on a GPU; without copies 16. The head's are rounded inside its op."""

    def rounded() -> list[tuple[int, ...]]:
        """Shapes of the graph's inputs that are rounded in it."""
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
        return shapes

    assert rounded() == []
    monkeypatch.setattr(GPT, "keep_copies", lambda model: None)
    assert len(rounded()) == 16
