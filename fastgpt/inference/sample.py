"""`fastgpt sample`: text from a trained model."""

from __future__ import annotations

import codecs
import sys
import time
from collections.abc import Iterable, Sequence

from fastgpt.config.schema import SampleConfig
from fastgpt.data.tokenizer import Tokenizer
from fastgpt.errors import UserError, read_text, reading
from fastgpt.inference.generate import BatchGenerator, Sampling
from fastgpt.model.device import Machine
from fastgpt.weights.source import open_source

RULE = "---------------"


def prompt_texts(start: str) -> list[str]:
    """The prompts of --start: the text itself, FILE:path, or each line of LINES:path."""
    kind, _, name = start.partition(":")
    if kind not in ("FILE", "LINES") or not name:
        return [start]
    with reading(f"--start={start}", "is not UTF-8 text"):
        text = read_text(name)
    lines = [line for line in text.splitlines() if line]
    if kind == "LINES" and not lines:
        raise UserError(f"--start={start}: has no lines")
    return lines if kind == "LINES" else [text]


def prompt_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a prompt; end-of-text by its name. Raises UserError if there are none."""
    if text == "<|endoftext|>" and tokenizer.eot is not None:
        return [tokenizer.eot]
    ids = [int(i) for i in tokenizer.encode(text)]
    if not ids:
        raise UserError("--start: is empty; give some text to go on from")
    return ids


class TextStream:
    """One text as its tokens come: whole characters only, and nothing from a stop string on.

    `feed` holds back what may be the beginning of a character or of a stop string. `stopped` is
    set once a stop string came. The prompt is shown as it is.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Iterable[int], stop_strings: Sequence[str]):
        self._tokenizer, self._stops = tokenizer, [s for s in stop_strings if s]
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.prompt = self._decoder.decode(tokenizer.decode_bytes(list(prompt)))
        self._held, self.stopped = "", False

    def feed(self, token: int) -> str:
        self._held += self._decoder.decode(self._tokenizer.decode_bytes([token]))
        return self._release()

    def end(self) -> str:
        """What was held back, at the end of the text."""
        self._held += self._decoder.decode(b"", final=True)
        text = self._release()
        if not self.stopped:
            text, self._held = text + self._held, ""
        return text

    def _release(self) -> str:
        if self.stopped:
            return ""
        found = [at for s in self._stops if (at := self._held.find(s)) >= 0]
        if found:
            text, self._held, self.stopped = self._held[: min(found)], "", True
            return text
        # Held back is the longest end of the text that begins a stop string.
        ends = range(len(self._held) + 1)
        cut = next(i for i in ends if any(s.startswith(self._held[i:]) for s in [*self._stops, ""]))
        text, self._held = self._held[:cut], self._held[cut:]
        return text


def sample(config: SampleConfig) -> int:
    """Print num_samples texts a prompt, each batch's first as it is made. Returns the exit code."""
    machine = Machine.of(config.device, config.dtype, config.compile)
    source = open_source(config)
    source.check_finite()
    tokenizer = source.tokenizer
    if tokenizer is None:
        if source.run_dir is None:
            raise UserError(f"{config.weights}: has no tokenizer that can be read, so no text")
        raise UserError(
            f"{source.run_dir}: its data has no tokenizer, so there is no text; if it is known, "
            f"name it: fastgpt train --init_from=resume --out_dir={source.run_dir} "
            "--tokenizer=gpt2 --vocab_file=FILE"
        )
    prompts = [prompt_ids(tokenizer, text) for text in prompt_texts(config.start)]
    bad = next((i for p in prompts for i in p if i >= source.shape.vocab_size), None)
    if bad is not None:
        raise UserError(
            f"--start: has token {bad}, the model knows {source.shape.vocab_size}: this tokenizer "
            f"({tokenizer.name}) is not the model's"
        )
    tasks = [(p, config.seed + k) for p in prompts for k in range(config.num_samples)]
    rows = min(config.batch_size, len(tasks))
    batch = BatchGenerator(
        source.model(machine),
        rows,
        max(map(len, prompts)) + config.max_new_tokens,
        Sampling(config.temperature, config.top_k, config.top_p, config.repetition_penalty),
        compiled=machine.compile,
    )
    print(source.about, file=sys.stderr)
    started, made = time.perf_counter(), 0
    for first in range(0, len(tasks), rows):
        made += _show(batch, tasks[first : first + rows], tokenizer, config)
    seconds = time.perf_counter() - started
    rate = f"{made / seconds:,.1f} tokens/s, {rows} at a time, {machine.device} {machine.dtype}"
    print(f"{made:,} tokens in {seconds:.1f}s: {rate}", file=sys.stderr)
    return 0


def _show(
    batch: BatchGenerator,
    tasks: Sequence[tuple[list[int], int]],
    tokenizer: Tokenizer,
    config: SampleConfig,
) -> int:
    """Generate and print up to a batch of texts. Returns the number of tokens."""
    n = len(tasks)
    filled = [*tasks, *[tasks[-1]] * (batch.batch_size - n)]  # the last batch may not be full
    ended = set(range(n, batch.batch_size))
    streams = [TextStream(tokenizer, p, config.stop_strings.split("|")) for p, _ in tasks]
    texts = [s.prompt for s in streams]
    print(texts[0], end="", flush=True)
    made = 0
    steps = batch.stream(
        [p for p, _ in filled],
        config.max_new_tokens,
        seeds=[seed for _, seed in filled],
        stop_token=tokenizer.eot if config.stop else None,
        ended=ended,
    )
    for tokens in steps:
        for row, (stream, token) in enumerate(zip(streams, tokens[:n], strict=True)):
            if token is None:
                continue
            made += 1
            # A model may know more ids than its tokenizer, as nanoGPT's 50,304 for 50,257.
            shown = stream.feed(token) if token < tokenizer.vocab_size else ""
            texts[row] += shown
            if row == 0 and shown:
                print(shown, end="", flush=True)
            if stream.stopped:
                ended.add(row)
    for row, stream in enumerate(streams):
        rest = stream.end()
        print(rest if row == 0 else texts[row] + rest)
        print(RULE)
    return made
