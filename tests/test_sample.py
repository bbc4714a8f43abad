"""`fastgpt sample` on a real, small run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests import runs
from tests.process import fastgpt
from tests.runs import TINY


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    path = runs.write_text(folder)
    fastgpt(folder, "train", *TINY, f"--input={path}", "--tokenizer=char", "--out_dir=out")
    return folder


def sample(folder: Path, *args: str, code: int = 0) -> str:
    few = ("--num_samples=2", "--max_new_tokens=30", "--device=cpu")
    return fastgpt(folder, "sample", "--out_dir=out", *few, *args, code=code)


def texts(said: str) -> list[str]:
    parts = said.split("\n---------------\n")
    first_line, _, first = parts[0].partition("\n")
    assert first_line.startswith("out/checkpoints/step_000000"), said
    return [first, *parts[1:-1]]


def test_samples_begin_with_the_prompt_and_follow_the_seed(trained: Path):
    a = texts(sample(trained, "--start=a cat"))
    assert len(a) == 2 and a[0] != a[1]
    assert all(t.startswith("a cat") and len(t) == len("a cat") + 30 for t in a)
    assert texts(sample(trained, "--start=a cat")) == a
    assert texts(sample(trained, "--start=a cat", "--seed=5")) != a


def test_prompt_from_a_file(trained: Path):
    (trained / "prompt.txt").write_text("on a mat")
    assert texts(sample(trained, "--start=FILE:prompt.txt"))[0].startswith("on a mat")


def test_greedy_samples_are_all_alike(trained: Path):
    a, b = texts(sample(trained, "--temperature=0"))
    assert a == b


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--start=FILE:none.txt"], "--start=FILE:none.txt: cannot be read: No such file"),
        (["--start="], "--start: is empty"),
        (["--start=東"], "東"),
        (["--checkpoint=step_1"], "--checkpoint=step_1: "),
        (["--temperature=-1"], "--temperature=-1.0: wanted a number >= 0"),
    ],
)
def test_bad_requests(args, message, trained: Path):
    said = sample(trained, *args, code=2)
    assert message in said and "Traceback" not in said


def test_a_damaged_best_checkpoint_is_named(trained: Path, tmp_path: Path):
    shutil.copytree(trained / "out", tmp_path / "out")
    best = (tmp_path / "out" / "checkpoints" / "best").read_text().strip()
    path = tmp_path / "out" / "checkpoints" / best / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    said = sample(tmp_path)
    assert said.startswith(f"damaged checkpoint: out/checkpoints/{best}/model.safetensors")
    assert said.count("---------------") == 2


def test_a_run_without_a_tokenizer(trained: Path, tmp_path: Path):
    shutil.copytree(trained / "out", tmp_path / "out")
    (tmp_path / "out" / "tokenizer.json").unlink()
    assert "has no tokenizer.json" in sample(tmp_path, code=2)
