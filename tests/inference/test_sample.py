"""`fastgpt sample` on a real, small run."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from fastgpt.data.tokenizer import ByteTokenizer
from fastgpt.inference.sample import TextStream
from fastgpt.model.gpt import ModelShape
from fastgpt.weights import hf_tokenizer, hugging_face
from tests import runs
from tests.inference.test_decode import lively
from tests.inference.test_generate import GOLDEN
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
    assert re.search(r"^[\d,]+ tokens in .*s: .* tokens/s, \d+ at a time, cpu float32$", parts[-1])
    return [first, *parts[1:-1]]


def test_the_text_of_the_golden_file(tmp_path: Path):
    shape = ModelShape(2, 2, 32, 48, 128, bias=True)
    hugging_face.write(tmp_path / "weights", shape, lively(shape).state_dict())
    hf_tokenizer.write(tmp_path / "weights", ByteTokenizer())
    said = fastgpt(tmp_path, "sample", "--weights=weights", *GOLDEN["sample_arguments"])
    assert GOLDEN["sample_stdout"].replace("\r", "\n") in said  # as pipes are read here


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


def test_texts_do_not_depend_on_how_many_are_made_at_a_time(trained: Path):
    some = ("--num_samples=5", "--start=a cat", "--top_k=5")
    one, three = (texts(sample(trained, *some, f"--batch_size={n}")) for n in (1, 3))
    assert one == three and len(set(one)) == 5


def test_every_line_of_a_file_as_a_prompt(trained: Path):
    (trained / "prompts.txt").write_text("A cat\n\non a mat and saw\ndog\n")
    said = texts(sample(trained, "--start=LINES:prompts.txt", "--num_samples=1", "--batch_size=2"))
    assert [t[:3] for t in said] == ["A c", "on ", "dog"]
    alone = texts(sample(trained, "--start=on a mat and saw", "--num_samples=1"))
    assert said[1] == alone[0]


def test_a_text_ends_before_a_stop_string(trained: Path):
    free = texts(sample(trained, "--start=a cat", "--temperature=0", "--max_new_tokens=40"))[0]
    stop = free[12:15]
    args = ("--start=a cat", "--temperature=0", "--max_new_tokens=40")
    got = texts(sample(trained, *args, f"--stop_strings=@@@|{stop}"))
    assert got == [free[: free.index(stop, 5)]] * 2


def test_a_repetition_penalty_changes_the_text(trained: Path):
    args = ("--start=a cat", "--temperature=0")
    plain, other = (texts(sample(trained, *args, f"--repetition_penalty={r}")) for r in (1, 1.5))
    assert plain != other


class Letters(ByteTokenizer):
    """Two letters a token, to have stop strings begin in the middle of one."""

    def _decode(self, ids):
        return b"".join(b"%c%c" % (i, i + 1) for i in ids.tolist())


@pytest.mark.parametrize("stops", [[], ["dcdc"], ["d"], ["xdc", "cxd"], ["efe"]])
def test_what_is_shown_as_it_comes(stops: list[str]):
    """Never more than what comes before the first stop string, and all of that at the end."""
    ids = [97, 99, 99, 99, 120, 99, 101, 101]
    whole = "".join(chr(i) + chr(i + 1) for i in ids)
    want = min((whole[: whole.index(s)] for s in stops if s in whole), key=len, default=whole)
    stream, shown = TextStream(Letters(), [98], stops), ""
    for i in ids:
        shown += stream.feed(i)
        assert want.startswith(shown)
    assert shown + stream.end() == want and stream.prompt == "bc"
    assert stream.stopped == (want != whole)


def test_half_a_character_is_held_back():
    stream = TextStream(ByteTokenizer(), "é".encode()[:1], [])
    assert stream.prompt == ""
    assert stream.feed("é".encode()[1]) == "é"
    assert stream.feed("é".encode()[0]) == "" and stream.end() == "\ufffd"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--start=LINES:none.txt"], "--start=LINES:none.txt: cannot be read: No such file"),
        (["--weights=none"], "--weights=none: there is no such file or folder"),
        (["--init_from=weights"], "--init_from=weights: which? name a folder with --weights=PATH"),
        (["--init_from=resume", "--weights=x"], "--weights: goes with --init_from=weights or"),
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
    assert "its data has no tokenizer, so there is no text" in sample(tmp_path, code=2)
