"""`fastgpt eval`: the loss on every token of a file, and HellaSwag.

The loss is not sampled: a window slides over the file so that each token but the first is predicted
once, with at least block_size - stride tokens before it if the file has that many.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from fastgpt.config.schema import EvalConfig, PrepareConfig
from fastgpt.data import token_files
from fastgpt.data.corpora import check_text
from fastgpt.data.prepare import ensure
from fastgpt.data.progress import progress
from fastgpt.data.token_files import Ids, TokenFile, open_dataset
from fastgpt.errors import BadWeights, UserError, read_bytes, read_text, reading
from fastgpt.model.device import Machine
from fastgpt.model.gpt import GPT
from fastgpt.storage import run
from fastgpt.weights.source import Source, open_source


@dataclass(frozen=True)
class Window:
    """`length` inputs from `start` on; only the last `count` targets are scored here."""

    start: int
    length: int
    count: int


def windows(n: int, block_size: int, stride: int) -> Iterator[Window]:
    """Windows over n tokens that score each of positions 1 .. n - 1 exactly once.

    The last one is moved back so that it too is full, if the file is long enough.
    """
    done = 1  # positions below it are scored; the first token has nothing before it
    while done < n:
        # The first window scores all it holds, each later one what `stride` brings.
        end = min(n, done + (block_size if done == 1 else stride))
        start = max(0, end - 1 - block_size)
        yield Window(start, end - 1 - start, end - done)
        done = end


@torch.no_grad()
def total_loss(
    model: GPT,
    tokens: np.ndarray | Ids,
    block_size: int,
    stride: int,
    batch_size: int,
    size: int | None = None,
) -> tuple[float, int]:
    """(sum of the cross entropy in nats, how many tokens) over the first `size` token ids."""
    size = len(tokens) if size is None else size
    device = next(model.parameters()).device
    total, count = torch.zeros((), dtype=torch.float64), 0
    todo = windows(size, block_size, stride)
    with progress("evaluating", size, unit="tokens") as advance:
        while batch := list(islice(todo, batch_size)):
            inputs, targets = [], []
            for w in batch:
                text = torch.from_numpy(tokens[w.start : w.start + w.length + 1].astype(np.int64))
                inputs.append(text[:-1])
                targets.append(text[1:].index_fill(0, torch.arange(w.length - w.count), -1))
            x = pad_sequence(inputs, batch_first=True)
            y = pad_sequence(targets, batch_first=True, padding_value=-1)
            n = sum(w.count for w in batch)
            total += model(x.to(device), y.to(device)).double().cpu() * n
            count += n
            advance(n)
    return total.item(), count


def evaluate(config: EvalConfig) -> int:
    """Print the figures for people, and one line of JSON last. Returns the exit code."""
    machine = Machine.of(config.device, config.dtype)
    source = open_source(config)
    ran_on = {"device": str(machine.device), "dtype": machine.dtype}
    if bad := source.not_finite():
        print(_line(config.task, {"loss": math.nan, "not_finite": bad}, ran_on), flush=True)
        source.check_finite()
    longest = source.shape.block_size
    block_size = config.block_size or longest
    stride = config.stride or max(1, block_size // 2)
    if block_size > longest:
        raise UserError(f"--block_size={block_size}: the model has {longest} positions")
    if stride > block_size:
        raise UserError(f"--stride={stride}: must not exceed block_size={block_size}")
    print(source.about)
    if config.task == "hellaswag":
        questions = read_hellaswag(config, source)
        figures = hellaswag(source.model(machine), questions, config.batch_size)
        print(f"{figures['questions']:,} questions of {config.input}")
        print(f"acc {figures['acc']:.4f}, acc_norm {figures['acc_norm']:.4f}")
    else:
        names, arrays = _tokens(config, source)
        model = source.model(machine)
        total, count, left = 0.0, 0, config.limit or None
        for tokens in arrays:
            size = len(tokens) if left is None else min(left, len(tokens))
            nats, n = total_loss(model, tokens, block_size, stride, config.batch_size, size)
            total, count = total + nats, count + n
            left = None if left is None else left - size
            if left == 0:
                break
        if not count:
            raise UserError(f"{names[0]}: has one token, and the first has nothing before it")
        loss = total / count
        perplexity = math.exp(loss) if loss < 700 else math.inf
        named = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        print(f"{count:,} tokens of {named}, windows of {block_size} every {stride}")
        bits = loss / math.log(2)
        print(f"loss {loss:.4f}, perplexity {perplexity:.3f}, {bits:.4f} bits a token")
        figures = {"tokens": count, "loss": loss, "perplexity": perplexity}
        figures |= {"block_size": block_size, "stride": stride}
    print(_line(config.task, figures, ran_on))
    if not all(math.isfinite(v) for v in figures.values()):
        raise BadWeights(f"{source.origin}: its loss is not a finite number")
    return 0


def _line(task: str, figures: dict[str, Any], ran_on: dict[str, str]) -> str:
    """The line for programs, in JSON, which has no NaN and no infinity: null."""
    plain = {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in figures.items()
    }
    return json.dumps({"task": task, **plain, **ran_on}, allow_nan=False)


def _tokens(config: EvalConfig, source: Source) -> tuple[list[str], list[np.ndarray | Ids]]:
    """Names and ids (n,) of what to evaluate on: token files, or a text; the model knows all ids.

    Raises UserError for a file that is neither.
    """
    path = Path(config.input)
    if config.input and not token_files.is_token_file(path):
        return [str(path)], [_text_ids(path, source)]
    files = _token_files(config, source)
    return [str(f.path) for f in files], [f.open() for f in files]


def _text_ids(path: Path, source: Source) -> np.ndarray:
    """Ids (n,) of a text by the model's own tokenizer."""
    with reading(path, "is neither UTF-8 text nor a token file (headered, or named *.bin)"):
        data = read_bytes(path)
        check_text(iter([data]))
    if source.tokenizer is None:
        raise UserError(f"--input={path}: is text, and the model's tokenizer is not known")
    if not data:
        raise UserError(f"--input={path}: is empty")
    ids = source.tokenizer.encode_bytes(data)
    if (largest := int(ids.max())) >= source.shape.vocab_size:
        raise UserError(
            f"--input={path}: has token {largest:,}, the model knows {source.shape.vocab_size:,}: "
            f"this tokenizer ({source.tokenizer.name}) is not the model's"
        )
    return ids


def _token_files(config: EvalConfig, source: Source) -> list[TokenFile]:
    """The files to evaluate on; the model knows every id in them."""
    known = source.shape.vocab_size
    mismatch = f"the model knows {known:,}: made with another tokenizer"
    if config.input:
        file = token_files.inspect(Path(config.input))
        if (largest := token_files.scan(file).max_id) >= known:
            raise UserError(f"{file.path}: holds token id {largest:,}, {mismatch}")
        return [file]
    if config.dataset:
        settings = PrepareConfig(dataset=config.dataset, data_dir=config.data_dir)
    elif source.run_dir is not None:
        settings = PrepareConfig.of(run.load_config(source.run_dir).data)
    else:
        raise UserError("eval: on what? name a token file with --input, or data with --dataset")
    dataset = open_dataset(ensure(settings))
    if (size := dataset.vocab_size) > known:
        raise UserError(f"{dataset.folder}: has a vocabulary of {size:,}, {mismatch}")
    return (dataset.val if config.split == "val" else dataset.train).shards


# --- HellaSwag -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """A beginning, four endings as token ids, and which of them is right."""

    context: list[int]
    endings: list[list[int]]
    label: int


def read_hellaswag(config: EvalConfig, source: Source) -> list[Question]:
    """Zellers et al. 2019: a file of JSON lines with ctx, endings and label (its val split).

    An ending is scored as the tokens of one blank and its text, as for GPT-2.
    """
    path, tokenizer = Path(config.input), source.tokenizer
    if tokenizer is None:
        raise UserError("--task=hellaswag: the model's tokenizer is not known")

    def ids(text: str) -> list[int]:
        return [int(i) for i in tokenizer.encode(text)]

    with reading(f"--input={path}", "is not UTF-8 text"):
        lines = read_text(path).splitlines()
    questions: list[Question] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if config.limit and len(questions) == config.limit:
            break
        with reading(path, f"line {number} is no question with ctx, four endings and a label"):
            entry = json.loads(line)
            endings, label = entry["endings"], int(entry["label"])
            if len(endings) != 4 or not 0 <= label < 4:
                raise ValueError(f"{len(endings)} endings, label {label}")
            endings = [ids(" " + ending) for ending in endings]
            questions.append(Question(ids(entry["ctx"]), endings, label))
    if not questions:
        raise UserError(f"{path}: has no questions")
    room = source.shape.block_size
    if any(len(e) > room for q in questions for e in q.endings):
        raise UserError(f"{path}: has an ending of more tokens than block_size={room}")
    return questions


@torch.no_grad()
def ending_losses(model: GPT, questions: list[Question]) -> tuple[Tensor, Tensor]:
    """Cross entropy of every ending given its beginning: (sums, means), each (questions, 4)."""
    device, room = next(model.parameters()).device, model.shape.block_size
    # The last ending token is a target only; a long beginning loses its first tokens.
    rows = [(q.context + e)[-room - 1 :] for q in questions for e in q.endings]
    lengths = [len(e) for q in questions for e in q.endings]
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(device)
    scored = torch.zeros(len(rows), ids.shape[1] - 1, dtype=torch.bool, device=device)
    for r, (row, n) in enumerate(zip(rows, lengths, strict=True)):
        scored[r, max(0, len(row) - 1 - n) : len(row) - 1] = True
    logits = model(ids[:, :-1]).float()
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    sums = (losses.view(scored.shape) * scored).sum(1)
    return sums.view(-1, 4), (sums / scored.sum(1)).view(-1, 4)


def hellaswag(model: GPT, questions: list[Question], batch_size: int) -> dict[str, float]:
    """Shares of right answers: by the least loss (acc), by the least loss per token (acc_norm)."""
    right = torch.zeros(2)
    with progress("evaluating", len(questions), unit="questions") as advance:
        for first in range(0, len(questions), batch_size):
            part = questions[first : first + batch_size]
            labels = torch.tensor([q.label for q in part])
            for k, losses in enumerate(ending_losses(model, part)):
                right[k] += (losses.argmin(1).cpu() == labels).sum()
            advance(len(part))
    acc, acc_norm = (right / len(questions)).tolist()
    return {"questions": len(questions), "acc": acc, "acc_norm": acc_norm}
