"""Drawing tokens, texts from a cache, and `fastgpt sample` on a real, small run."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

from fastgpt import cli
from fastgpt.data.tokenizer import ByteTokenizer
from fastgpt.inference.generate import BatchGenerator, Sampling, TextStream, draw, uniforms
from fastgpt.model.gpt import GPT
from tests.inference.conftest import shape
from tests.models import random_model
from tests.process import fastgpt

LOGITS = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
GREEDY = Sampling(temperature=0)
CUT = Sampling(temperature=0.9, top_k=20, top_p=0.9)
PENALISED = Sampling(0.9, 20, 0.9, repetition_penalty=1.2)
PROMPTS = [[1], [2, 3, 4], list(range(23)), list(range(24)), list(range(40))]
GOLDEN = json.loads(Path(__file__).with_name("golden_text.json").read_text())


# --- drawing a token ------------------------------------------------------------------------------


def draws(logits: torch.Tensor, n: int = 400, **cut) -> torch.Tensor:
    uniform = torch.rand(n, generator=torch.Generator().manual_seed(0))
    return draw(logits.expand(n, -1), uniform, Sampling(**cut))


@pytest.mark.parametrize(
    ("cut", "want"),
    [
        ({}, {0, 1, 2, 3}),
        ({"temperature": 0.0}, {0}),
        ({"top_k": 1}, {0}),
        ({"top_k": 2}, {0, 1}),
        ({"top_k": 99}, {0, 1, 2, 3}),
        ({"top_p": 0.01}, {0}),
        ({"top_p": 0.5}, {0}),
        ({"top_p": 0.6}, {0, 1}),
        ({"top_p": 0.81}, {0, 1, 2}),
        ({"top_k": 3, "top_p": 0.99}, {0, 1, 2}),
        *(({"temperature": t}, {0}) for t in (1e-30, 1e-38, 1e-39, 1e-46, 5e-324)),
        *(({"top_p": p}, {0}) for p in (1e-46, 5e-324)),
        ({"temperature": 1e300}, {0, 1, 2, 3}),
    ],
)
def test_cuts(cut, want):
    before = LOGITS.clone()
    assert set(draws(LOGITS, **cut).tolist()) == want
    assert torch.equal(LOGITS, before)


def test_tokens_come_as_often_as_their_probability_says():
    """Draws only tokens that were kept, even for the largest number below 1."""
    shares = draws(LOGITS, n=20_000).bincount() / 20_000
    torch.testing.assert_close(shares, LOGITS.exp(), rtol=0, atol=0.015)
    n = (draws(LOGITS[:2], n=20_000, temperature=0.5) == 0).sum().item()
    assert n / 20_000 == pytest.approx(0.25 / (0.25 + 0.09), abs=0.015)
    last = torch.tensor([1 - 2.0**-24])
    for cut, want in (({}, 3), ({"top_k": 2}, 1), ({"top_p": 0.6}, 1)):
        assert draw(LOGITS[None], last, Sampling(**cut)).item() == want
        assert draw(LOGITS[None], torch.zeros(1), Sampling(**cut)).item() == 0
    tail = torch.full((1, 50_000), -30.0).index_fill(1, torch.tensor([7]), 5.0)
    assert draw(tail, last, Sampling(top_k=1)).item() == 7


@pytest.mark.parametrize("penalty", [1.5, 1e300])
@pytest.mark.parametrize("logits", [[2.0, 1.5], [-1.0, -1.2]])
def test_repetition_penalty_makes_seen_tokens_unlikelier(logits, penalty):
    """Expects CTRL's definition: positive logits shrink, negative ones grow more negative."""
    for r, want in ((penalty, [1, 0]), (1 / penalty, [0, 1])):
        for seen, token in zip(([[True, False]], [[False, True]]), want, strict=True):
            sampling = Sampling(temperature=1e-300, repetition_penalty=r)
            drawn = draw(torch.tensor([logits]), torch.zeros(1), sampling, torch.tensor(seen))
            assert drawn.item() == token


# --- texts ----------------------------------------------------------------------------------------


def texts_of(batch: BatchGenerator, prompts, n: int, seeds, stop=None) -> list[list[int]]:
    rows = zip(*batch.stream(prompts, n, seeds, stop), strict=True)
    return [[token for token in row if token is not None] for row in rows]


def alone(model: GPT, prompt, n: int, sampling: Sampling, seed: int) -> list[int]:
    return texts_of(BatchGenerator(model, 1, len(prompt) + n, sampling), [prompt], n, [seed])[0]


def plain(model: GPT, prompt: list[int], n: int, sampling: Sampling, seed: int) -> list[int]:
    """Returns a text made without a cache, by a pass over the last block_size tokens per token."""
    ids, numbers = list(prompt), uniforms([seed], n)
    for i in range(n):
        with torch.no_grad():
            logits = model(torch.tensor([ids[-model.shape.block_size :]]))[:, -1]
        seen = torch.zeros_like(logits, dtype=torch.bool).index_fill(1, torch.tensor(ids), True)
        ids.append(int(draw(logits, numbers[:, i], sampling, seen)))
    return ids[len(prompt) :]


def test_reduced_precision_is_that_of_the_model():
    model = random_model(shape(), dtype=torch.bfloat16)
    batch = BatchGenerator(model, 1, 24, GREEDY)
    logits = batch.prefill([[1, 2, 3]])
    batch.tokens.fill_(4)
    with torch.no_grad():
        want = model(torch.tensor([[1, 2, 3, 4]]))[0]
    assert batch.cache.dtype == logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits[0], want[2], rtol=0.02, atol=0.1)
    torch.testing.assert_close(batch.step()[0], want[3], rtol=0.02, atol=0.1)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(top_k=10), CUT, PENALISED], ids=str)
def test_a_text_is_that_of_its_prompt_alone(sampling):
    """Prompts of many lengths in one batch, far past block_size; without a cache, and with one."""
    size = shape(bias=False, gelu="erf", n_head=1) if sampling == CUT else shape()
    model = random_model(size, dropout=0.5).train()
    batch = BatchGenerator(model, 7, 100, sampling)
    cached = [alone(model, prompt, 40, sampling, row) for row, prompt in enumerate(PROMPTS)]
    assert cached[1] != alone(model, PROMPTS[1], 40, sampling, 9) or sampling == GREEDY
    for value in (1e6, 0):  # nothing is read that a row did not write itself
        batch.cache.fill_(value)
        assert texts_of(batch, PROMPTS, 40, range(5)) == cached
    assert model.training, "the mode is left alone, and dropout is off all the same"
    model.eval()
    assert cached == [plain(model, p, 40, sampling, row) for row, p in enumerate(PROMPTS)]
    # Small models soon repeat themselves when greedy.
    assert sampling == GREEDY or all(len(set(text)) > 10 for text in cached)


def test_a_stop_token_or_the_caller_ends_a_row_and_too_much_is_refused():
    model, batch = random_model(shape()), BatchGenerator(random_model(shape()), 2, 41, Sampling())
    free = [alone(model, [k], 40, Sampling(), seed=k) for k in (1, 2)]
    stop = free[0][7]
    want = [text[: text.index(stop)] if stop in text else text for text in free]
    assert texts_of(batch, [[1], [2]], 40, [1, 2], stop) == want
    seen = []
    for tokens in batch.stream([[1], [2]], 40, [1, 2]):
        seen.append(tokens)
        batch.ended.add(0 if len(seen) < 3 else 1)
    assert [t[0] is None for t in seen] == [False, True, True]
    for prompts in ([[1]], [[1], []], [[1]] * 3):
        with pytest.raises(ValueError, match="wanted at most 2, each of at least 1"):
            list(batch.stream(prompts, 5, [1] * max(2, len(prompts))))
    with pytest.raises(ValueError, match="texts of 42 tokens: wanted at most 41"):
        list(batch.stream([[1], [1, 2]], 40, [1, 2]))


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_replayed_graph_is_the_eager_step(dtype):
    for sampling in (GREEDY, PENALISED):
        texts, model = [], random_model(shape(n_head=1), dtype=dtype).cuda()
        for graphed in (False, True):
            batch = BatchGenerator(model, 5, 70, sampling)
            batch.graphed = graphed
            texts += [texts_of(batch, PROMPTS, 30, range(5)) for _ in range(2)]
        assert texts[0] == texts[1] == texts[2] == texts[3]
        if sampling == GREEDY and dtype == torch.float32:
            assert texts[0] == [plain(model.cpu(), p, 30, GREEDY, 0) for p in PROMPTS]


# --- the command ----------------------------------------------------------------------------------


def sample(folder: Path, *args: str, code: int = 0) -> str:
    few = ("--num_samples=2", "--max_new_tokens=30", "--device=cpu")
    return fastgpt(folder, "sample", "--out_dir=out", *few, *args, code=code)


def texts(folder: Path, *args: str) -> list[str]:
    parts = sample(folder, *args).split("\n---------------\n")
    first_line, _, first = parts[0].partition("\n")
    assert first_line.startswith("out/checkpoints/step_000000"), parts
    assert re.search(r"^[\d,]+ tokens in .*s: .* tokens/s, \d+ at a time, cpu float32$", parts[-1])
    return [first, *parts[1:-1]]


@pytest.mark.parametrize("terminal", [True, False])
def test_the_golden_text_escapes_control_characters_on_a_terminal(
    terminal, home: Path, monkeypatch, capsys
):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    with pytest.raises(SystemExit, match="0"):
        cli.main(["sample", f"--weights={home}/lively", *GOLDEN["sample_arguments"]])
    want = GOLDEN["sample_stdout"]
    for code in {*range(32), 127} - {9, 10} if terminal else ():
        want = want.replace(chr(code), chr(code).encode("unicode_escape").decode())
    assert capsys.readouterr().out == want


def test_samples_follow_prompt_seed_and_settings(home: Path):
    a, greedy = texts(home, "--start=a cat"), texts(home, "--start=a cat", "--temperature=0")
    assert all(t.startswith("a cat") and len(t) == len("a cat") + 30 for t in a)
    assert a[0] != a[1] and greedy[0] == greedy[1]
    stop = greedy[0][12:15]
    stopped = [greedy[0][: greedy[0].index(stop, 5)]] * 2
    for flags, want in (
        ((), a),
        (("--temperature=1e-40",), greedy),
        (("--temperature=0", f"--stop_strings=@@@|{stop}"), stopped),
    ):
        assert texts(home, "--start=a cat", *flags) == want
    assert texts(home, "--start=a cat", "--seed=5") != a
    assert texts(home, "--start=a cat", "--temperature=0", "--repetition_penalty=1.5") != greedy


def test_many_prompts_at_a_time(home: Path):
    (home / "prompts.txt").write_text("A cat\n\non a mat and saw\ndog\n")
    assert texts(home, "--start=FILE:prompts.txt")[0].startswith("A cat\n\non a mat and saw\n")
    three, one = (
        texts(home, "--start=LINES:prompts.txt", "--top_k=5", f"--batch_size={n}") for n in (3, 1)
    )
    assert three == one and [t[:3] for t in one] == ["A c", "A c", "on ", "on ", "dog", "dog"]
    assert len(set(one)) == 6 and one[2:4] == texts(home, "--start=on a mat and saw", "--top_k=5")


class Letters(ByteTokenizer):
    """Tokenizer of two letters per token, in the middle of which a stop string may begin."""

    def _decode(self, ids):
        return b"".join(b"%c%c" % (i, i + 1) for i in ids.tolist())


@pytest.mark.parametrize("stops", [[], ["dcdc"], ["d"], ["xdc", "cxd"], ["efe"]])
def test_what_is_shown_as_it_comes(stops: list[str]):
    """Shows never more than comes before the first stop string, and all of that at the end."""
    ids = [97, 99, 99, 99, 120, 99, 101, 101]
    whole = "".join(chr(i) + chr(i + 1) for i in ids)
    want = min((whole[: whole.index(s)] for s in stops if s in whole), key=len, default=whole)
    stream = TextStream(Letters(), [98], stops)
    shown = itertools.accumulate((stream.feed(i), stream.take())[1] for i in [*ids, 1000])
    assert all(f"bc{want}".startswith(text) for text in shown)
    stream = TextStream(Letters(), [98], stops)
    assert [stream.feed(i) for i in ids][-1] == stream.feed(final=True) == (want != whole)
    assert stream.take() == f"bc{want}"
    stream = TextStream(ByteTokenizer(), "é".encode()[:1], [])
    assert stream.take() == "", "half a character is held back"
    assert stream.feed("é".encode()[1], "é".encode()[0]) is False and stream.take() == "é"
    stream.feed(final=True)
    assert stream.take() == "\ufffd"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--start=LINES:none.txt"], "--start=LINES:none.txt: cannot be read: No such file"),
        (["--start=FILE:none.txt"], "--start=FILE:none.txt: cannot be read: No such file"),
        (["--weights=none"], "--weights=none: there is no such file or folder"),
        (["--start="], "--start: is empty"),
        (["--start=東"], "東"),
        (["--checkpoint=step_1"], "--checkpoint=step_1: "),
    ],
)
def test_bad_requests(args, message, home: Path):
    said = sample(home, *args, code=2)
    assert message in said and "Traceback" not in said


def test_a_damaged_best_checkpoint_and_a_missing_tokenizer(home: Path, tmp_path: Path):
    shutil.copytree(home / "out", tmp_path / "out")
    best = (tmp_path / "out" / "checkpoints" / "best").read_text().strip()
    path = tmp_path / "out" / "checkpoints" / best / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    said = sample(tmp_path)
    assert said.startswith(f"damaged checkpoint: out/checkpoints/{best}/model.safetensors")
    assert said.count("---------------") == 2
    (tmp_path / "out" / "tokenizer.json").unlink()
    assert "its data has no tokenizer, so there is no text" in sample(tmp_path, code=2)
