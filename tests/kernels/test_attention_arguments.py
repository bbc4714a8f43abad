"""Bad arguments of attention: the error names the argument, what it got and what it wants."""

from typing import Any

import pytest
import torch

from fastgpt_kernels import attention, launch
from fastgpt_kernels.registry import Sizes, spec

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GOOD = torch.zeros(1, 4, 192)

BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"qkv": [1.0]}, TypeError, "qkv must be a tensor, got list"),
    ({"qkv": None}, TypeError, "qkv must be a tensor, got NoneType"),
    ({"qkv": torch.zeros(4, 192)}, ValueError, r"qkv must have 3 dimensions, got shape \(4, 192\)"),
    ({"qkv": torch.zeros(1, 2, 4, 96)}, ValueError, "qkv must have 3 dimensions"),
    ({"qkv": GOOD.long()}, TypeError, "qkv must be of dtype bfloat16, .* got int64"),
    ({"qkv": GOOD.cfloat()}, TypeError, "qkv must be of dtype .* got complex64"),
    ({"qkv": GOOD.double()}, TypeError, "qkv must be of dtype .* got float64"),
    ({"qkv": GOOD[:, :0]}, ValueError, r"qkv must have at least one position, got \(1, 0, 192\)"),
    ({"n_head": 0}, ValueError, "n_head must be at least 1, got 0"),
    ({"n_head": -2}, ValueError, "n_head must be at least 1, got -2"),
    ({"n_head": 2.0}, TypeError, "n_head must be an int, got float"),
    ({"n_head": True}, TypeError, "n_head must be an int, got bool"),
    ({"n_head": 5}, ValueError, "n_head must divide qkv's last dimension .* n_head=5 and 192"),
    ({"n_head": 4}, ValueError, "head dim must be one of 32, 64, 80, 96, 128, got 16"),
    (
        {"qkv": torch.zeros(1, 4, 3 * 256), "n_head": 1},
        ValueError,
        "head dim must be one of .* got 256",
    ),
    ({"causal": 1}, TypeError, "causal must be a bool, got int"),
    ({"causal": None}, TypeError, "causal must be a bool, got NoneType"),
    ({"deterministic": "yes"}, TypeError, "deterministic must be a bool or None, got str"),
    ({"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
    ({"dropout_p": -0.1}, ValueError, r"dropout_p must be in \[0, 1\), got -0.1"),
    ({"dropout_p": float("nan")}, ValueError, r"dropout_p must be in \[0, 1\), got nan"),
    ({"dropout_p": None}, TypeError, "dropout_p must be a float, got NoneType"),
    ({"dropout_p": "0.1"}, TypeError, "dropout_p must be a float, got str"),
    ({"scale": 0.0}, ValueError, "scale must be finite and > 0, got 0.0"),
    ({"scale": -1.0}, ValueError, "scale must be finite and > 0, got -1.0"),
    ({"scale": float("inf")}, ValueError, "scale must be finite and > 0, got inf"),
    ({"scale": "1"}, TypeError, "scale must be a float or None, got str"),
    ({"seed": 1.5}, TypeError, "seed must be an int, a tensor or None, got float"),
    ({"seed": 2**63}, ValueError, "seed must fit in 64 bits, got 9223372036854775808"),
    ({"seed": torch.zeros(2, dtype=torch.int64)}, ValueError, r"seed must have one element, .*2"),
    ({"seed": torch.zeros(1)}, TypeError, "seed must be of dtype int64, got float32"),
    ({"seed": torch.zeros(1, dtype=torch.int64, device="meta")}, ValueError, "seed must be on"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=lambda x: str(x)[:40])
def test_bad_argument(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"qkv": GOOD, "n_head": 2, **change}
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and value.device.type == "cpu":
            arguments[name] = value.to(DEVICE)
    with pytest.raises(error, match=f"^attention: {message}"):
        attention(**arguments)


def test_bad_arguments_are_refused_without_a_gpu_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", False)
    with pytest.raises(ValueError, match="head dim must be one of"):
        attention(torch.zeros(1, 4, 192), 4)
    attention(torch.zeros(1, 4, 192, dtype=torch.float64), 2)  # the reference takes float64


@pytest.mark.skipif(DEVICE.type == "cuda", reason="no interpreter with a GPU")
def test_the_interpreter_refuses_bf16() -> None:
    with pytest.raises(TypeError, match="attention: Triton's interpreter"):
        attention(GOOD.bfloat16(), 2)


def test_limits_say_why() -> None:
    known, gpt2 = spec("attention"), Sizes()
    assert "tensor-core" in known.unsupported_reason("triton", "sm_75", torch.float16, gpt2)
    assert "head dim 48" in known.unsupported_reason(
        "triton", "sm_80", torch.float16, Sizes(n_head=16)
    )
    assert known.unsupported_reason("triton", "sm_80", torch.bfloat16, gpt2) is None
