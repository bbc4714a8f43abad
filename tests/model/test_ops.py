"""The eager implementations against formulas in fp64, and how an implementation is chosen."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from torch.nn import functional as F

from fastgpt.errors import UserError
from fastgpt.model import ops
from fastgpt.model.ops import Wish
from fastgpt_kernels import OPS, launch, versions
from fastgpt_kernels.registry import Sizes, spec, specs

PARTS = {"attention", "head", "linear", "memory", "optimizer"}


def eager(op: str):
    return spec(op).eager


def test_every_op_has_its_record_and_the_implementations_that_flags_name():
    for name, entry in OPS.items():
        op = spec(name)
        assert op.name == name and op.category in PARTS and op.kernels
        assert set(op.implementations) == set(entry.choices)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention(causal, scale):
    qkv = torch.randn(2, 5, 3 * 12, dtype=torch.float64)
    q, k, v = (a.unflatten(-1, (3, 4)).transpose(1, 2) for a in qkv.split(12, dim=-1))
    scores = q @ k.transpose(-1, -2) * (scale or 1 / math.sqrt(4))
    if causal:
        scores = scores.masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), -torch.inf)
    want = (scores.softmax(-1) @ v).transpose(1, 2).flatten(-2)
    torch.testing.assert_close(eager("attention")(qkv, 3, causal=causal, scale=scale), want)


def test_add_layer_norm_is_add_and_layer_norm():
    x, r, w, b = (torch.randn(*s, dtype=torch.float64) for s in ((2, 8), (2, 8), (8,), (8,)))
    y, out = eager("add_layer_norm")(x, r, w, b)
    assert torch.equal(out, x + r)
    assert torch.equal(y, eager("layer_norm")(out, w, b))
    want = (out - out.mean(-1, keepdim=True)) / (
        out.var(-1, correction=0, keepdim=True) + 1e-5
    ) ** 0.5
    torch.testing.assert_close(y, want * w + b)


@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_bias_gelu(approximate):
    x, b = torch.randn(3, 8), torch.randn(8)
    assert torch.equal(
        eager("bias_gelu")(x, b, approximate), F.gelu(x + b, approximate=approximate)
    )
    assert torch.equal(eager("bias_gelu")(x, None, approximate), F.gelu(x, approximate=approximate))


def test_linear_cross_entropy_leaves_padding_out():
    x, w = torch.randn(6, 8), torch.randn(10, 8)
    targets = torch.tensor([0, 3, 6, -1, 2, 5])
    want = F.cross_entropy(x @ w[:7].T, targets, ignore_index=-1)
    got = eager("linear_cross_entropy")(x, w, targets, vocab_size=7)
    torch.testing.assert_close(got, want)
    assert eager("linear_cross_entropy")(x.bfloat16(), w.bfloat16(), targets).dtype == torch.float32


def test_table_gives_a_reason_for_every_op():
    table = ops.choose(torch.device("cpu"))
    assert {c.op for c in table.choices} == set(vars(table)) - {"choices", "_ours"}
    assert {c.op for c in table.choices} == {op.name for op in specs("model")}
    assert all(c.implementation == "eager" and c.reason for c in table.choices)
    assert ops.describe(table.choices).startswith("eager (no GPU): attention, ")


CPU = torch.device("cpu")


def choices(wish: Wish | None = None, sizes: Sizes | None = None) -> dict[str, ops.Choice]:
    return {c.op: c for c in ops.choose(CPU, sizes=sizes, wish=wish).choices}


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        (Wish("triton"), "--kernels=triton: no GPU"),
        (Wish(ops={"attention": "cudnn"}), "--op.attention=cudnn: no GPU"),
        (Wish(ops={"attention": "flash"}), "--op.attention=flash: on a CPU it has no dropout"),
        (Wish(ops={"attention": "hopper"}), "--op.attention=hopper: no GPU"),
        (Wish(ops={"bias_gelu": "triton"}), "--op.bias_gelu=triton: no GPU"),
    ],
    ids=str,
)
def test_what_cannot_run_here_is_refused(wish, message):
    with pytest.raises(UserError, match=message):
        choices(wish, Sizes(dropout=0.1))


def test_asking_for_eager_is_the_reason():
    chosen = choices(Wish("eager", {"attention": "eager"}))
    assert chosen["attention"].reason == "--op.attention=eager"
    assert chosen["layer_norm"].reason == "--kernels=eager"


def interpreted(monkeypatch) -> None:
    from fastgpt_kernels import launch

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(launch, "INTERPRETED", True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run for real here")
def test_the_shapes_decide_too(monkeypatch):
    interpreted(monkeypatch)
    chosen = choices(sizes=Sizes(n_head=188, n_embd=48 * 188))
    assert chosen["attention"].implementation == "eager"
    assert "head dim 48 is none of 32, 64" in chosen["attention"].reason
    with pytest.raises(UserError, match="--op.attention=hopper: hopper is for sm_90, not cpu"):
        choices(Wish(ops={"attention": "hopper"}))
    assert "width 9024 is more than 8192" in chosen["add_layer_norm"].reason
    assert chosen["bias_gelu"].implementation == "triton"


def test_fp32_weights_with_bf16_activations():
    x, w, b = torch.randn(4, 8).bfloat16(), torch.randn(8), torch.randn(8)
    y = eager("layer_norm")(x, w, b)
    assert y.dtype == torch.bfloat16
    want = F.layer_norm(x.float(), (8,), w, b)
    torch.testing.assert_close(y, want.bfloat16())
    assert eager("bias_gelu")(x, b).dtype == torch.bfloat16


@pytest.mark.parametrize(("seconds", "said"), [(7.0, "checked 0 kernels in 7.0s\n"), (5.0, "")])
def test_checks_that_took_long_say_so(seconds, said, monkeypatch, capsys):
    monkeypatch.setattr(ops, "telling", lambda what: contextlib.nullcontext(lambda: seconds))
    ops.choose(CPU)
    assert capsys.readouterr().out == said


@pytest.mark.parametrize(
    ("installed", "said"),
    [
        ({"torch": "2.11.0+cu130", "triton": "3.6.0"}, ""),
        ({"torch": "2.15.1", "triton": "3.9.0"}, ""),
        ({"torch": "2.13.0+cpu"}, ""),
        ({"torch": "2.16.0", "triton": "3.9.0"}, "torch 2.16.0 is not among 2.11 to 2.15"),
        ({"torch": "2.15.0", "triton": "4.0.0"}, "triton 4.0.0 is not among 3.6 to 3.9"),
        ({"torch": "2.9.1", "triton": "3.5.0"}, "torch 2.9.1 is not among 2.11 to 2.15"),
        ({"torch": "3.0", "triton": "3.10.0"}, "torch 3.0 is not"),
    ],
)
def test_which_versions_are_tested(installed, said):
    assert versions.outside(installed).startswith(said) and bool(said) == bool(
        versions.outside(installed)
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run for real here")
def test_untested_versions_run_eager_unless_asked_and_warn_once(monkeypatch, capsys):
    monkeypatch.setattr(launch, "INTERPRETED", True)
    monkeypatch.setattr(versions, "untested", lambda: "torch 9.9 is not among 2.11 to 2.15")
    ops._warn_of_versions.cache_clear()
    for _ in range(2):
        chosen = choices(sizes=Sizes())
        assert {c.implementation for c in chosen.values()} == {"eager"}
        assert chosen["bias_gelu"].reason == "torch 9.9 is not among 2.11 to 2.15"
    assert capsys.readouterr().out.count("warning: torch 9.9 is not among") == 1
    assert choices(ops.Wish("triton"))["bias_gelu"].implementation == "triton"
    monkeypatch.setattr(launch, "INTERPRETED", False)
    with pytest.raises(UserError, match="no GPU"):
        ops.choose(CPU, wish=ops.Wish("triton"))
