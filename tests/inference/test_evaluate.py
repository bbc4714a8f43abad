"""Tests of the loss over a whole file, token by token, and of HellaSwag's scores."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from fastgpt.data.token_files import header
from fastgpt.inference.evaluate import Question, ending_losses, total_loss, windows
from fastgpt.model.gpt import GPT
from tests import runs
from tests.inference.conftest import shape
from tests.models import random_model
from tests.process import fastgpt


@settings(max_examples=200, deadline=None)
@given(n=st.integers(0, 200), block_size=st.integers(1, 40), data=st.data())
def test_every_token_is_scored_once_with_enough_before_it(n: int, block_size: int, data):
    stride, scored = data.draw(st.integers(1, block_size)), []
    for start, length, count in windows(n, block_size, stride):
        assert 0 < count <= length <= block_size and start >= 0
        for target in range(start + length + 1 - count, start + length + 1):
            assert target - start >= min(target, block_size - stride + 1)
            scored.append(target)
        assert length == min(block_size, n - 1), "windows are full where the file allows"
    assert scored == list(range(1, n))


def per_token(model: GPT, tokens: np.ndarray, block_size: int, stride: int) -> float:
    """Computes the loss by one forward pass per token."""
    total, T = 0.0, block_size
    for t in range(1, len(tokens)):
        # Position t is scored by the window that ends at or after it.
        end = T if t <= T else min(T + -(-(t - T) // stride) * stride, len(tokens) - 1)
        first = max(0, min(end, len(tokens) - 1) - T)
        ids = torch.from_numpy(tokens[first:t].astype(np.int64))[None]
        with torch.no_grad():
            logits = model(ids)[0, -1]
        total += F.cross_entropy(logits[None], torch.tensor([int(tokens[t])])).item()
    return total


def test_the_sum_is_that_of_each_token_by_itself():
    model = random_model(shape())
    for n, block_size, stride in ((60, 24, 12), (61, 10, 3), (7, 24, 24), (1, 8, 4)):
        tokens = np.random.default_rng(0).integers(0, 50, n).astype(np.uint16)
        want = per_token(model, tokens, block_size, stride)
        for batch_size in (1, 4):
            total = total_loss(model, tokens, n, block_size, stride, batch_size)
            assert total == pytest.approx(want, rel=1e-6)


def test_endings_are_scored_given_their_beginning():
    """Compares with one forward pass per ending; a long beginning loses its first tokens."""
    model = random_model(shape())
    rng = np.random.default_rng(0)
    text = lambda n: rng.integers(0, 50, n).tolist()  # noqa: E731
    questions = [Question(text(n), [text(m) for m in (1, 4, 2, 9)], 0) for n in (1, 10, 40)]
    sums, means = ending_losses(model, questions)
    for q, question in enumerate(questions):
        for e, ending in enumerate(question.endings):
            ids = torch.tensor((question.context + ending)[-25:])
            with torch.no_grad():
                losses = F.cross_entropy(model(ids[None, :-1])[0], ids[1:], reduction="none")
            part = losses[-len(ending) :]
            assert sums[q, e].item() == pytest.approx(part.sum().item(), rel=1e-5)
            assert means[q, e].item() == pytest.approx(part.mean().item(), rel=1e-5)


# --- the command ---------------------------------------------------------------------------------


def evaluate(home: Path, *args: str) -> dict:
    """Returns the JSON line of the command."""
    said = fastgpt(home, "eval", "--device=cpu", *args)
    return json.loads(said.splitlines()[-1])


def test_a_run_on_its_own_validation_data(home: Path):
    args = ("--out_dir=out", "--stride=1", "--limit=500")
    got, train = evaluate(home, *args), evaluate(home, *args, "--split=train")
    assert (got["tokens"], got["block_size"]) == (499, 16) and train["loss"] != got["loss"]
    assert got["perplexity"] == pytest.approx(math.exp(got["loss"]))
    last = runs.records(home / "out", "eval")[-1]["val_loss"]
    assert got["loss"] == pytest.approx(last, abs=0.3)


def test_a_text_and_its_token_files_have_the_same_loss(home: Path):
    """Expects log 256 of an untrained model."""
    text = ("The cat sat on the mat; größer.\n" * 30).encode()
    ids = np.frombuffer(text, np.uint8).astype(np.uint16)
    (home / "text").write_bytes(text)
    (home / "plain.bin").write_bytes(ids.tobytes())
    (home / "headed.bin").write_bytes(header(len(ids), ids.dtype) + ids.tobytes())
    names = ("text", "plain.bin", "headed.bin")
    got, *others = (evaluate(home, "--weights=weights", f"--input={name}") for name in names)
    assert [got, got] == others and got["tokens"] == len(text) - 1 and got["stride"] == 32
    assert got["loss"] == pytest.approx(math.log(256), abs=0.05)
    of_run = evaluate(home, "--out_dir=out", "--input=text.txt")
    assert of_run["tokens"] == (home / "text.txt").stat().st_size - 1


def test_weights_that_are_not_finite(home: Path):
    """eval's line stays JSON; eval and sample say what is wrong and exit with 1."""
    bad = load_file(home / "weights" / "model.safetensors")
    bad["transformer.h.0.ln_1.weight"][3] = math.nan
    bad["transformer.wpe.weight"][0, 0] = math.inf
    shutil.copytree(home / "weights", home / "nan", dirs_exist_ok=True)
    save_file(bad, home / "nan" / "model.safetensors")
    (home / "few.txt").write_text("some text")
    evaluated = fastgpt(home, "eval", "--weights=nan", "--input=few.txt", code=1)
    sampled = fastgpt(home, "sample", "--weights=nan", "--start=a", code=1)
    for error in (evaluated.splitlines()[-1], sampled.splitlines()[-1]):
        assert error.startswith("fastgpt: nan: 2 of 16 tensors hold NaN or infinity, transformer.")
    line = evaluated.splitlines()[-2]
    got = json.loads(line, parse_constant=lambda c: pytest.fail(f"{c} is no JSON"))
    assert got["loss"] is None and "transformer.h.0.ln_1.weight" in got["not_finite"]


def test_hellaswag(home: Path):
    """Expects the shortest endings of an untrained model, to which all tokens are as likely."""
    rng, words = np.random.default_rng(0), ["cat", "dog", "mat", "sea", "run"]
    lines: list[dict] = [{"ctx": "A cat", "label": k} for k in rng.integers(0, 4, 10).tolist()]
    for line in lines:
        line["endings"] = [" ".join(rng.choice(words, k + 1)) for k in range(4)]
    (home / "hellaswag.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    args = ("--weights=weights", "--task=hellaswag", "--input=hellaswag.jsonl")
    got = evaluate(home, *args)
    shortest = [min(range(4), key=lambda k: len(line["endings"][k])) for line in lines]
    right = sum(s == line["label"] for s, line in zip(shortest, lines, strict=True))
    assert got["questions"] == 10 and got["acc"] == pytest.approx(right / 10)
    assert 0 <= got["acc_norm"] <= 1
    assert evaluate(home, *args, "--limit=3")["questions"] == 3


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--weights=weights"], "eval: on what? name a token file with --input"),
        (["--weights=weights", "--input=none.bin"], "none.bin: cannot be read: No such file"),
        (["--weights=weights", "--input=none.txt"], "none.txt: cannot be read: No such file"),
        (["--weights=weights", "--input=odd.dat"], "odd.dat: is neither UTF-8 text nor a token"),
        (["--weights=weights", "--input=pipe"], "pipe: is a FIFO, a file is wanted"),
        (["--weights=weights", "--input=pipe.bin"], "pipe.bin: is a FIFO, a file is wanted"),
        (["--weights=weights", "--input=/dev/zero"], "/dev/zero: is a device, a file is wanted"),
        (["--weights=weights", "--input=nothing.txt"], "--input=nothing.txt: is empty"),
        (["--out_dir=out", "--block_size=17"], "--block_size=17: the model has 16 positions"),
        (["--out_dir=out", "--stride=17"], "--stride=17: must not exceed block_size=16"),
        (["--out_dir=out", "--input=large.bin"], "holds token id 999, the model knows"),
        (["--out_dir=out", "--input=one.bin"], "one.bin: has one token"),
        (["--weights=weights", "--task=hellaswag", "--input=bad.jsonl"], "bad.jsonl: line 2 is no"),
        (["--weights=weights", "--task=hellaswag", "--input=empty"], "empty: has no questions"),
        (["--weights=weights", "--task=hellaswag", "--input=long"], "an ending of more tokens"),
    ],
)
def test_bad_requests(args, message, home: Path):
    np.array([1, 999], np.uint16).tofile(home / "large.bin")
    np.array([1], np.uint16).tofile(home / "one.bin")
    lines = [{"ctx": "a", "endings": ["b"] * n, "label": 0} for n in (4, 2)]
    (home / "bad.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    (home / "empty").write_text("\n")
    (home / "odd.dat").write_bytes("Größe".encode("latin-1"))
    (home / "nothing.txt").touch()
    for name in ("pipe", "pipe.bin"):
        if not (home / name).exists():
            os.mkfifo(home / name)
    (home / "long").write_text(json.dumps({"ctx": "a", "endings": ["b" * 99] * 4, "label": 0}))
    said = fastgpt(home, "eval", *args, code=2)
    assert message in said.splitlines()[-1] and "Traceback" not in said
