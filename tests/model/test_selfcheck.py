"""The self-check lets right ops through, names what is wrong, and checks what trains."""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastgpt.config.presets import laptop
from fastgpt.config.settings import replace as replace_settings
from fastgpt.model import build, ops
from fastgpt.model.device import Machine
from fastgpt.model.gpt import GPT, ModelShape
from fastgpt.model.ops import Choice, OpTable
from fastgpt_kernels import OPS
from fastgpt_kernels.registry import Implementation, Sizes, spec, specs
from fastgpt_kernels.selfcheck import calls, disagreement, few_rows
from tests.model.test_ops import CPU, interpreted

SMALL = Sizes(3, 40, 2, 64, 300, 384)
DROPPING = replace(SMALL, dropout=0.3, bias=False, gelu="erf")
FLAGGED = [name for name, op in OPS.items() if op.chosen_by]


def check(op, function=None, dtype=torch.float32, sizes=SMALL):
    """As "triton" a function, as "eager" the record's own."""
    known = spec(op)
    if function is None:
        return disagreement(known, "eager", CPU, dtype, sizes)
    triton = Implementation(function)
    known = replace(known, implementations={**known.implementations, "triton": triton})
    return disagreement(known, "triton", CPU, dtype, sizes)


@pytest.mark.quick("*norm-*", "attention-dropout", "bias_gelu-*")
@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/kernels run them for real")
@pytest.mark.parametrize("sizes", [SMALL, DROPPING], ids=["bias", "dropout"])
@pytest.mark.parametrize("op", FLAGGED)
def test_selfcheck_passes_the_kernels(op, sizes, monkeypatch):
    interpreted(monkeypatch)
    assert check(op, spec(op).triton, sizes=sizes) == ""


def broken(op):
    """The op with gradients that are 1 % off."""
    eager = spec(op).eager

    def function(*args, **kwargs):
        kwargs.pop("chunk_tokens", None)
        out = eager(*args, **kwargs)
        return (
            tuple(o * 1.01 - o.detach() * 0.01 for o in out)
            if isinstance(out, tuple)
            else (out * 1.01 - out.detach() * 0.01)
        )

    return function


@pytest.mark.parametrize("op", FLAGGED)
def test_selfcheck_sees_what_is_wrong(op):
    def refuses(*args, **kwargs):
        raise RuntimeError("PassManager::run failed\nand more")

    assert "is off by 0.0" in check(op, broken(op))
    assert check(op, refuses) == "does not run here (PassManager::run failed)"


def test_a_wrong_dropout_mask_is_seen():
    """Ours follows the specification's mask; PyTorch's, which draw their own, are held without."""
    eager = spec("attention").eager
    assert "is off by" in check("attention", eager, sizes=DROPPING)
    assert check("attention", sizes=DROPPING) == ""


@pytest.mark.parametrize("op", FLAGGED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("sizes", [SMALL, DROPPING], ids=["bias", "dropout"])
def test_eager_rows_are_right_in_low_precision(op, dtype, sizes):
    assert check(op, dtype=dtype, sizes=sizes) == ""


@pytest.mark.parametrize("T", [1, 40, 128, 200, 256, 300, 384, 520, 1000, 1024, 8192])
@pytest.mark.parametrize("B", [1, 2, 3, 7, 12, 64, 480])
@pytest.mark.parametrize("tokens", [512, 4096])
def test_few_rows_compile_to_the_same_kernels(B, T, tokens):
    """Triton compiles anew for multiples of 16 and for 1, attention for whole tiles of 128."""
    sizes = Sizes(B, T, 25, 1600)
    few = few_rows(sizes, tokens)
    assert replace(few, batch_size=B, block_size=T) == sizes
    assert few.block_size % 128 == T % 128
    assert (few.tokens % 16 == 0) == (sizes.tokens % 16 == 0)
    assert (few.tokens == 1) == (sizes.tokens == 1)
    assert few.tokens <= min(sizes.tokens, 2 * tokens + 16 * 384)


def watched(op, seen):
    """Eager, noting what a call compiles to, as far as that hangs on dtypes, widths and options."""
    eager = spec(op).eager

    def of(name, x):
        if not isinstance(x, Tensor):
            return x
        return x.dtype, x.shape if name.endswith(("weight", "bias")) else x.shape[-1]

    def function(*arguments, **options):
        options.pop("chunk_tokens", None)
        given = inspect.signature(eager).bind(*arguments, **options)
        given.apply_defaults()
        ignored = ("seed", "targets")
        found = {(k, of(k, x)) for k, x in given.arguments.items() if k not in ignored}
        seen.setdefault(op, set()).add(frozenset(found))
        return eager(*arguments, **options)

    return function


def checked(op, sizes, dtype):
    seen: dict[str, set] = {}
    for rounded, _ in calls(spec(op), "triton", CPU, dtype, sizes):
        spec(op).run(watched(op, seen), rounded)
    return seen[op]


RUNS = pytest.mark.parametrize(
    "shape",
    [ModelShape(2, 2, 64, 40, 300, True), ModelShape(2, 2, 64, 40, 300, False, "erf")],
    ids=["bias", "erf"],
)
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)


@RUNS
@DTYPES
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_what_is_checked_is_what_the_model_calls(shape, dropout, dtype):
    """In training and evaluation, whether norms are ours or not: each call is checked, no other."""
    seen: dict[str, set] = {}
    names = [op.name for op in specs("model")]
    functions = {name: watched(name, seen) for name in names}
    ids = torch.randint(300, (3, 41))
    ours = Choice("attention", "triton", ""), Choice("add_layer_norm", "triton", "")
    for choices in (ours, ours[:1]):
        model = GPT(shape, dropout, OpTable(functions, choices), dtype).init_weights(0)
        model(ids[:, :-1], ids[:, 1:]).backward()
        with torch.no_grad():
            model.eval()(ids[:, :-1], ids[:, 1:])
    assert seen == {name: checked(name, shape.sizes(3, dropout), dtype) for name in names}


def test_chunks_evaluation_and_vocabulary_of_the_loss():
    cases = [
        c for c, _ in calls(spec("linear_cross_entropy"), "triton", CPU, torch.bfloat16, SMALL)
    ]
    training, evaluation = cases
    assert training.gradients and not evaluation.gradients
    chunk = training.arguments["chunk_tokens"]
    assert 2 * chunk < SMALL.tokens < 3 * chunk, "three chunks, and the last is shorter"
    for case in cases:
        assert case.inputs[1].shape == (384, 64) and case.arguments["vocab_size"] == 300
        assert case.arguments["targets"].max() < 300


def test_checks_ask_for_the_sizes_of_the_config(monkeypatch):
    asked = []
    choose = ops.choose
    monkeypatch.setattr(build.ops, "choose", lambda *a: asked.append(a) or choose(*a))
    config = replace_settings(
        laptop(), dropout=0.1, bias=True, gelu="erf", batch_size=5, kernels="eager"
    )
    build.build(config, 61, Machine(CPU, "bfloat16"))
    want = Sizes(5, 64, 4, 128, 61, 128, 0.1, bias=True, gelu="erf")
    assert asked == [(CPU, torch.bfloat16, want, ops.Wish("eager", vars(config.op)))]
