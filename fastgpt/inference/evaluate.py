"""Evaluation for `fastgpt eval`: the loss on every token of a file, and HellaSwag.

A window slides over the file so that each token but the first is predicted once, with at least
block_size - stride tokens before it if the file has that many.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from fastgpt.config.schema import EvalConfig, PrepareConfig
from fastgpt.data.corpora import NotText, text_of_file
from fastgpt.data.prepare import ensure
from fastgpt.data.progress import progress
from fastgpt.data.token_files import TokenFile, is_token_file, open_dataset
from fastgpt.errors import UserError, read_text, reading
from fastgpt.model.device import Machine
from fastgpt.model.gpt import GPT
from fastgpt.storage import run_dir as run
from fastgpt.weights.source import Source, open_source


def evaluate(config: EvalConfig) -> int:
    """Prints the figures as text, and last as one line of JSON. Returns the exit code."""
    machine = Machine.of(config.device, config.dtype)
    source = open_source(config)
    task, ran_on = config.task, {"device": str(machine.device), "dtype": machine.dtype}
    if bad := source.not_finite():
        print(json.dumps({"task": task, "loss": None, "not_finite": bad, **ran_on}), flush=True)
        source.check_finite()
    print(source.about)
    figures = (hellaswag if task == "hellaswag" else loss)(config, source, machine)
    # JSON has neither NaN nor infinity.
    plain = {k: v if math.isfinite(v) else None for k, v in figures.items()}
    print(json.dumps({"task": task, **plain, **ran_on}, allow_nan=False))
    if plain != figures:
        raise UserError(f"{source.origin}: its loss is not a finite number", code=1)
    return 0


# --- the loss on files ----------------------------------------------------------------------------


def loss(config: EvalConfig, source: Source, machine: Machine) -> dict[str, float]:
    """Returns the mean loss on the first `limit` tokens of the data, and its settings."""
    longest = source.shape.block_size
    block_size = config.block_size or longest
    stride = config.stride or max(1, block_size // 2)
    if block_size > longest:
        raise UserError(f"--block_size={block_size}: the model has {longest} positions")
    if stride > block_size:
        raise UserError(f"--stride={stride}: must not exceed block_size={block_size}")
    names, arrays = _tokens(config, source)
    model, left, total, count = source.model(machine), config.limit or 1 << 62, 0.0, 0
    for tokens in arrays:
        size = min(left, len(tokens))
        total += total_loss(model, tokens, size, block_size, stride, config.batch_size)
        count, left = count + max(0, size - 1), left - size
    if not count:
        raise UserError(f"{names[0]}: has one token, and the first has nothing before it")
    mean = total / count
    perplexity = math.exp(mean) if mean < 700 else math.inf
    named = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    print(f"{count:,} tokens of {named}, windows of {block_size} every {stride}")
    bits = mean / math.log(2)
    print(f"loss {mean:.4f}, perplexity {perplexity:.3f}, {bits:.4f} bits per token")
    figures = {"tokens": count, "loss": mean, "perplexity": perplexity}
    return {**figures, "block_size": block_size, "stride": stride}


def windows(n: int, block_size: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yields windows over n tokens that score each of positions 1 .. n - 1 exactly once.

    (start, length, count): of `length` inputs from `start` on, the last `count` targets are scored.
    The last window is moved back so that it is full too, if the file is long enough.
    """
    done = 1  # positions below it are scored, but the first token, which has none before it
    while done < n:
        # The first window scores all its targets, each later one `stride` of them.
        end = min(n, done + (block_size if done == 1 else stride))
        start = max(0, end - 1 - block_size)
        yield start, end - 1 - start, end - done
        done = end


@torch.no_grad()
def total_loss(
    model: GPT,
    tokens: np.ndarray | TokenFile,
    size: int,
    block_size: int,
    stride: int,
    batch_size: int,
) -> float:
    """Returns the sum of the cross entropy in nats over the first `size` ids."""
    total, device = 0.0, model.transformer.wte.weight.device
    todo = windows(size, block_size, stride)
    with progress("evaluating", size, unit="tokens") as advance:
        while batch := list(islice(todo, batch_size)):
            inputs, targets = [], []
            for start, length, scored in batch:
                text = torch.from_numpy(tokens[start : start + length + 1].astype(np.int64))
                inputs.append(text[:-1])
                targets.append(text[1:].index_fill(0, torch.arange(length - scored), -1))
            x = pad_sequence(inputs, batch_first=True).to(device)
            y = pad_sequence(targets, batch_first=True, padding_value=-1).to(device)
            n = sum(scored for *_, scored in batch)
            total += model(x, y).item() * n
            advance(n)
    return total


def _tokens(config: EvalConfig, source: Source) -> tuple[list[str], list[np.ndarray | TokenFile]]:
    """Returns names and ids (n,) of token files or of a text, all of which the model knows.

    Raises UserError for a file that is neither.
    """
    path, known = Path(config.input), source.shape.vocab_size
    mismatch = f"the model knows {known:,}: made with another tokenizer"
    if config.input and not is_token_file(path):
        wrong = "is neither UTF-8 text nor a token file (headered, or named *.bin)"
        with reading(path, wrong, NotText):
            text = "".join(text_of_file(path))
        if not text:
            raise UserError(f"--input={path}: is empty")
        return [str(path)], [source.encode(text, f"--input={path}")]
    if config.input:
        file = TokenFile(path)
        if (largest := file.scan().max_id) >= known:
            raise UserError(f"{file.path}: holds token id {largest:,}, {mismatch}")
        return [str(path)], [file]
    if config.dataset:
        settings = PrepareConfig(dataset=config.dataset, data_dir=config.data_dir)
    elif source.run_dir is not None:
        settings = PrepareConfig.of(run.load_config(source.run_dir).data)
    else:
        raise UserError("eval: on what? name a token file with --input, or data with --dataset")
    dataset = open_dataset(ensure(settings))
    if (size := dataset.vocab_size) > known:
        raise UserError(f"{dataset.folder}: has a vocabulary of {size:,}, {mismatch}")
    shards = (dataset.val if config.split == "val" else dataset.train).shards
    return [str(shard.path) for shard in shards], list(shards)


# --- HellaSwag -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """Question of a beginning and four endings as token ids, with the right ending's number."""

    context: list[int]
    endings: list[list[int]]
    label: int


def read_hellaswag(path: Path, source: Source, limit: int) -> list[Question]:
    """Reads JSON lines with ctx, endings and label (val split of Zellers et al. 2019).

    An ending becomes the tokens of one blank and its text, as for GPT-2.
    """
    questions: list[Question] = []
    with reading(f"--input={path}", "is not UTF-8 text"):
        lines = [line for line in enumerate(read_text(path).splitlines(), 1) if line[1].strip()]
    for number, line in lines[: limit or None]:
        with reading(path, f"line {number} is no question with ctx, four endings and a label"):
            entry = json.loads(line)
            texts, label = [entry["ctx"], *entry["endings"]], int(entry["label"])
            if len(texts) != 5 or not 0 <= label < 4:
                raise ValueError(f"{len(texts) - 1} endings, label {label}")
            texts = [texts[0], *(f" {ending}" for ending in texts[1:])]
            context, *endings = (source.encode(text, path).tolist() for text in texts)
            questions.append(Question(context, endings, label))
    if not questions:
        raise UserError(f"{path}: has no questions")
    room = source.shape.block_size
    if any(len(e) > room for q in questions for e in q.endings):
        raise UserError(f"{path}: has an ending of more tokens than block_size={room}")
    return questions


@torch.no_grad()
def ending_losses(model: GPT, questions: list[Question]) -> tuple[Tensor, Tensor]:
    """Returns sums and means (B, 4) of the endings' cross entropy, given their beginning."""
    device, room = next(model.parameters()).device, model.shape.block_size
    # The last ending token is a target only. A long beginning loses its first tokens.
    rows = [(q.context + e)[-room - 1 :] for q in questions for e in q.endings]
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(device)
    lengths = torch.tensor([len(e) for q in questions for e in q.endings], device=device)
    ends = torch.tensor([len(row) - 1 for row in rows], device=device)
    at = torch.arange(ids.shape[1] - 1, device=device)
    scored = (at < ends[:, None]) & (at >= (ends - lengths)[:, None])
    logits = model(ids[:, :-1]).float()
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    sums = (losses.view(scored.shape) * scored).sum(1)
    return sums.view(-1, 4), (sums / scored.sum(1)).view(-1, 4)


def hellaswag(config: EvalConfig, source: Source, machine: Machine) -> dict[str, float]:
    """Returns the shares of right answers by the least sum (acc) and mean (acc_norm) of losses."""
    questions = read_hellaswag(Path(config.input), source, config.limit)
    model, right, n = source.model(machine), torch.zeros(2), len(questions)
    with progress("evaluating", n, unit="questions") as advance:
        for first in range(0, n, config.batch_size):
            part = questions[first : first + config.batch_size]
            labels = torch.tensor([q.label for q in part])
            chosen = torch.stack(ending_losses(model, part)).argmin(-1).cpu()
            right += (chosen == labels).sum(1)
            advance(len(part))
    acc, acc_norm = (right / n).tolist()
    print(f"{n:,} questions of {config.input}\nacc {acc:.4f}, acc_norm {acc_norm:.4f}")
    return {"questions": n, "acc": acc, "acc_norm": acc_norm}
