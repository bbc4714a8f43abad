"""The sampling benchmark: it compares before it claims, and its table and JSON agree."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import generate, results
from fastgpt.inference import decode
from fastgpt.model.gpt import GPT
from fastgpt.model.ops import Choice
from fastgpt.weights.hugging_face import shape_of_size
from fastgpt_kernels import reference

FEW = ["--device=cpu", "--dtype=float32", "--new=12", "--prompt=3"]


@pytest.mark.parametrize("more", [["--every=1"], ["--every=5", "--batch=2", "--rounds=2"]])
def test_a_run(more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.main([*FEW, *more, f"--out={tmp_path}"]) == 0
    said = capsys.readouterr().out
    row = json.loads(said.splitlines()[-1])
    compared = 12 if "--every=1" in more else 3
    assert row["tokens_compared"] == compared and row["tokens_that_differ"] == 0
    assert f"{compared} of {compared} tokens compared are the same" in said
    (path,) = results.files(tmp_path)
    (stored,) = results.load(path)["rows"]
    assert stored["key"] == row["key"] and len(stored["samples_ms"]) == 1 + ("--rounds=2" in more)
    batch = 2 if "--batch=2" in more else 1
    assert row["tokens_per_second"] == pytest.approx(1e3 * batch / row["median_ms"])


def test_fused_linear_layers_are_held_against_pytorchs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the reference in the kernel's place: it takes the same way through the decoder."""
    choose_all = decode.choose_all

    def choose(*asked: Any) -> dict[str, tuple[Choice, Callable[..., Any]]]:
        fake = Choice("decode_linear", "triton", "fake"), reference.decode_linear
        return choose_all(*asked) | {"decode_linear": fake}

    monkeypatch.setattr(decode, "choose_all", choose)
    assert generate.main([*FEW, "--rounds=2", "--every=1"]) == 0
    said = capsys.readouterr().out
    row = json.loads(said.splitlines()[-1])
    assert row["fused_linears"] and row["without_fused_linears_ms"] > 0
    assert row["tokens_that_differ"] == 0
    assert "cache, fused linear layers" in said and "cache, PyTorch's" in said


def test_a_wrong_text_gets_no_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    honest = generate.cached

    def wrong(*args):
        texts, decoding, first = honest(*args)
        texts[0][-1] = (texts[0][-1] + 1) % 512
        return texts, decoding, first

    monkeypatch.setattr(generate, "cached", wrong)
    assert generate.main([*FEW, "--every=1"]) == 1
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row["problem"] == "1 of 12 tokens are not the cache-free path's"


def test_bytes_of_the_weights() -> None:
    """GPT-2 124M: 85.1M in the blocks and the last norm, 38.6M in the output layer; 2 bytes each,
    but for the 38,400 of the norms' weights and biases."""
    with torch.device("meta"):
        model = GPT(shape_of_size("gpt2"), dtype=torch.bfloat16)
    blocks = 12 * (12 * 768**2 + 9 * 768 + 4 * 768)
    norms = 25 * 2 * 768
    want = 2 * (blocks - 24 * 2 * 768 + 50257 * 768) + 4 * norms
    assert generate.weight_bytes(model) == want


@pytest.mark.parametrize("bad", [["--new=1"], ["--batch=0"], ["--size=gpt3"], ["--device=tpu"]])
def test_bad_arguments(bad: list[str]) -> None:
    with pytest.raises(SystemExit) as e:
        generate.main(bad)
    assert e.value.code == 2


@pytest.mark.cuda
def test_on_a_gpu_against_the_roof(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--size=gpt2", "--new=32", "--every=8", f"--out={tmp_path}"]
    assert generate.main(args) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0 < row["share_of_weight_roof"] < 1
