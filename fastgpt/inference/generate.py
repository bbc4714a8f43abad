"""Text from a trained model for `fastgpt sample`, many rows at a time, from a static cache.

While a text fits block_size, a token costs one pass over the weights, on a GPU one CUDA graph. A
longer text goes on from its last block_size tokens, as in nanoGPT. GPT-2's positions are absolute,
so every key and value changes as the window moves, and a token costs a pass over the window.
"""

from __future__ import annotations

import codecs
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from fastgpt.config.schema import SampleConfig
from fastgpt.data.tokenizer import Tokenizer
from fastgpt.errors import UserError, read_text, reading
from fastgpt.model.device import Machine
from fastgpt.model.gpt import GPT, Block
from fastgpt.weights.source import Source, open_source

RULE = "---------------"
Tokens = Sequence[int]


# --- drawing a token ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampling:
    """Settings by which a token is drawn from its logits: Holtzman et al. 2020, Keskar et al. 2019.

    The penalty divides positive logits of tokens that the text has already and multiplies others.
    """

    temperature: float = 1.0  # 0: the likeliest token
    top_k: int = 0  # 0: all tokens
    top_p: float = 1.0
    repetition_penalty: float = 1.0


def draw(logits: Tensor, uniform: Tensor, sampling: Sampling, seen: Tensor | None = None) -> Tensor:
    """Draws next tokens (B,) from logits (B, V) and numbers (B,) uniform in [0, 1).

    seen (B, V) bool marks the tokens of a row, for a repetition penalty. The draw inverts the
    distribution function, so one number per token decides, on any device.
    """
    logits = logits.float()
    # Beyond these bounds quotients and products leave fp32's range. The result is their limit.
    temperature, top_p, penalty = (
        min(max(x, 1e-15), 1e15)
        for x in (sampling.temperature, sampling.top_p, sampling.repetition_penalty)
    )
    if penalty != 1.0 and seen is not None:
        penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
        logits = torch.where(seen, penalised, logits)
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        kth = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    probs = logits.softmax(-1)
    if top_p < 1:
        ordered, ids = probs.sort(dim=-1, descending=True, stable=True)
        # A token stays if those before it hold less than top_p: the likeliest one always does.
        ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= top_p, 0.0)
        probs = torch.zeros_like(probs).scatter_(1, ids, ordered)
    # In fp64 (which MPS lacks) u * total < total for every fp32 u < 1.
    total = probs.cumsum(-1, dtype=torch.float32 if probs.device.type == "mps" else torch.float64)
    wanted = uniform.to(total.dtype).unsqueeze(1) * total[:, -1:]
    found = torch.searchsorted(total, wanted, right=True).squeeze(1)
    return found.clamp(max=logits.shape[-1] - 1)


def uniforms(seeds: Sequence[int], n: int) -> Tensor:
    """Returns (rows, n) fp32 in [0, 1) on the CPU; row r depends on seeds[r] alone."""
    rows = [torch.rand(n, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows)


# --- many texts at a time -------------------------------------------------------------------------


class BatchGenerator:
    """Generator of texts for `batch_size` prompts at a time, each of its own length.

    model       read with its present weights, without dropout in any mode
    longest     most tokens of a text, prompt included
    compiled    torch.compile the step that makes a token

    The same seed gives the same text if the logits agree. On a GPU a step is one CUDA graph, unless
    `graphed` is set to False. The caller may put numbers of rows into `ended` while texts are made.
    """

    def __init__(
        self, model: GPT, batch_size: int, longest: int, sampling: Sampling, compiled: bool = False
    ):
        shape, t, self.sampling = model.shape, model.transformer, sampling
        self.shape, self.dtype, self.kernels = shape, model.dtype, model.kernels
        self.batch_size, self.longest = batch_size, longest
        self.wte, self.wpe = t.wte.weight.detach(), t.wpe.weight.detach()
        self.head, self.final_norm = self.wte[: shape.vocab_size].to(self.dtype), t.ln_f
        self.norms, self.linears = [], []
        for block in (cast(Block, b) for b in t.h):
            self.norms += [block.ln_1, block.ln_2]
            layers = (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj)
            self.linears.append([self._cast(layer) for layer in layers])
        # Tensors that a step reads and writes keep their addresses, for the graph's replays.
        self.device = device = self.wte.device
        self.max_len = min(longest, shape.block_size)
        size = (shape.n_layer, 2, batch_size, shape.n_head, self.max_len, shape.head_dim)
        self.cache = torch.zeros(size, dtype=self.dtype, device=device)
        self.rows = torch.arange(batch_size, device=device)
        self.positions, self.tokens = torch.zeros_like(self.rows), torch.zeros_like(self.rows)
        self.uniform = torch.zeros(batch_size, device=device)
        seen = torch.zeros(batch_size, shape.vocab_size, dtype=torch.bool, device=device)
        self.seen = None if self.sampling.repetition_penalty == 1.0 else seen
        self.graphed, self.ended = device.type == "cuda", set[int]()
        self._step = torch.compile(self.step) if compiled else self.step
        self._warm = False
        self._graph: torch.cuda.CUDAGraph | None = None

    def _cast(self, layer: torch.nn.Linear) -> tuple[Tensor, Tensor | None]:
        bias = None if layer.bias is None else layer.bias.detach().to(self.dtype)
        return layer.weight.detach().to(self.dtype), bias

    def _hidden(self, x: Tensor, attend: Callable[[int, Tensor], Tensor]) -> Tensor:
        """Returns the final norm's output for embeddings (..., C); attend(layer, qkv) gives y."""
        x, (first, *norms) = x.to(self.dtype), [*self.norms, self.final_norm]
        approximate = "none" if self.shape.gelu == "erf" else "tanh"
        y = self.kernels.layer_norm(x, first.weight, first.bias)
        for i, (attn_in, attn_out, (fc_weight, fc_bias), mlp_out) in enumerate(self.linears):
            norm, next_norm = norms[2 * i : 2 * i + 2]
            branch = F.linear(attend(i, F.linear(y, *attn_in)), *attn_out)
            y, x = self.kernels.add_layer_norm(branch, x, norm.weight, norm.bias)
            h = self.kernels.bias_gelu(F.linear(y, fc_weight), fc_bias, approximate)
            branch = F.linear(h, *mlp_out)
            y, x = self.kernels.add_layer_norm(branch, x, next_norm.weight, next_norm.bias)
        return y

    @torch.no_grad()
    def prefill(self, texts: Sequence[Tokens]) -> Tensor:
        """Fills the cache with the last block_size tokens of every text. Returns logits (B, V).

        Texts are padded on the right, where causal attention never looks.
        """
        ends = [torch.tensor(list(text[-self.shape.block_size :])) for text in texts]
        ids = pad_sequence(ends, batch_first=True).to(self.device)
        self.positions.copy_(torch.tensor([len(end) for end in ends]))
        (B, T), H, D = ids.shape, self.shape.n_head, self.shape.head_dim

        def attend(i: int, qkv: Tensor) -> Tensor:
            self.cache[i, :, :, :, :T] = qkv.view(B, T, 3, H, D).permute(2, 0, 3, 1, 4)[1:]
            return self.kernels.attention(qkv, H)

        y = self._hidden(self.wte[ids] + self.wpe[:T], attend)
        return F.linear(y[self.rows, self.positions - 1], self.head)

    @torch.no_grad()
    def step(self) -> Tensor:
        """Extends row b, of less than max_len tokens, by tokens[b]. Returns logits (B, V)."""
        B, H, D, at = self.batch_size, self.shape.n_head, self.shape.head_dim, self.positions
        seen = torch.arange(self.max_len, device=self.device) <= at.view(B, 1, 1, 1)

        def attend(i: int, qkv: Tensor) -> Tensor:
            q, k, v = qkv.view(B, 3, H, D).unbind(1)
            keys, values = self.cache[i]
            keys[self.rows, :, at], values[self.rows, :, at] = k, v
            y = F.scaled_dot_product_attention(q.unsqueeze(2), keys, values, seen)
            return y.reshape(B, H * D)

        logits = F.linear(self._hidden(self.wte[self.tokens] + self.wpe[at], attend), self.head)
        self.positions += 1
        return logits

    @torch.no_grad()
    def stream(
        self, prompts: Sequence[Tokens], n: int, seeds: Sequence[int], stop: int | None = None
    ) -> Iterator[list[int | None]]:
        """Yields the next token of every prompt, None for ended ones, until all have ended.

        A text ends before the token `stop`, after n tokens, or once its row is in `ended`.
        """
        rows, lengths = self.batch_size, [len(p) for p in prompts]
        if len(prompts) > rows or len(seeds) != len(prompts) or min(lengths) < 1:
            given = f"{len(seeds)} seeds and prompts of {lengths} tokens"
            raise ValueError(f"{given}: wanted at most {rows}, each of at least 1")
        if (most := max(lengths) + n) > self.longest:
            raise ValueError(f"texts of {most} tokens: wanted at most {self.longest}")
        idle = rows - len(prompts)
        texts = [list(p) for p in prompts] + [[0] for _ in range(idle)]
        numbers = uniforms([*seeds] + [0] * idle, n).to(self.device)
        self.ended = set(range(len(prompts), self.batch_size))
        if self.seen is not None:
            self.seen.zero_()
            for row, text in zip(self.seen, texts, strict=True):
                row[text] = True
        for i in range(n):
            self.uniform.copy_(numbers[:, i])
            if i == 0 or max(map(len, texts)) > self.shape.block_size:
                self._draw(self.prefill(texts))
            elif self.graphed:
                self._replay()
            else:
                self._draw(self._step())
            tokens = self.tokens.tolist()
            self.ended |= {row for row, token in enumerate(tokens) if token == stop}
            if len(self.ended) == rows:
                return
            yield [None if row in self.ended else tokens[row] for row in range(len(prompts))]
            for text, token in zip(texts, tokens, strict=True):
                text.append(token)

    def _draw(self, logits: Tensor) -> None:
        self.tokens.copy_(draw(logits, self.uniform, self.sampling, self.seen))
        if self.seen is not None:
            self.seen.scatter_(1, self.tokens.unsqueeze(1), True)

    def _replay(self) -> None:
        """Draws the next tokens by a CUDA graph. The first call loads all kernels."""
        if not self._warm:
            self._warm = True
            return self._draw(self._step())
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):  # records, and computes nothing
                self._draw(self._step())
        self._graph.replay()


# --- the command ----------------------------------------------------------------------------------


def prompts_of(start: str, source: Source) -> list[list[int]]:
    """Returns the prompts of --start: the text itself, FILE:path, or each line of LINES:path."""
    kind, _, name = start.partition(":")
    texts, eot = [start], source.need_tokenizer().eot
    if kind in ("FILE", "LINES") and name:
        with reading(f"--start={start}", "is not UTF-8 text"):
            texts = [read_text(name)]
    if kind == "LINES" and name and not (texts := list(filter(None, texts[0].splitlines()))):
        raise UserError(f"--start={start}: has no lines")
    special = {} if eot is None else {"<|endoftext|>": [eot]}
    prompts = [special.get(t) or source.encode(t, "--start").tolist() for t in texts]
    if not all(prompts):
        raise UserError("--start: is empty; give some text to go on from")
    return prompts


def on_screen(text: str) -> str:
    """Returns a model's text, with control characters escaped if stdout is a terminal."""
    if not sys.stdout.isatty():
        return text
    escape = lambda match: match[0].encode("unicode_escape").decode()  # noqa: E731
    return re.sub(r"[\0-\x08\x0b-\x1f\x7f-\x9f]", escape, text)


class TextStream:
    """Decoder of tokens as they come, into whole characters before the first stop string.

    `feed` holds back the possible beginning of a character or of a stop string, and returns True
    once a stop string came. `take` returns the new text, the first time with the prompt.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Tokens, stop_strings: Sequence[str]):
        self._tokenizer, self._stops = tokenizer, [s for s in stop_strings if s]
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._ready, self._held = self._decoder.decode(tokenizer.decode_bytes(prompt)), ""
        self._stopped = False

    def feed(self, *tokens: int, final: bool = False) -> bool:
        if self._stopped:
            return True
        # A model may know more ids than its tokenizer, as nanoGPT's 50,304 for 50,257.
        known = [token for token in tokens if token < self._tokenizer.vocab_size]
        held = self._held + self._decoder.decode(self._tokenizer.decode_bytes(known), final)
        found = [at for s in self._stops if (at := held.find(s)) >= 0]
        self._stopped, cut = bool(found), min(found, default=len(held))
        if not found and not final:  # held back is the longest end that begins a stop string
            begun = (i for i in range(cut) if any(s.startswith(held[i:]) for s in self._stops))
            cut = next(begun, cut)
        self._ready, self._held = self._ready + held[:cut], held[cut:]
        return self._stopped

    def take(self) -> str:
        text, self._ready = self._ready, ""
        return text


def sample(config: SampleConfig) -> int:
    """Prints num_samples texts per prompt, and returns the exit code.

    Texts go to stdout, other lines to stderr. The first text of a batch is printed as it is made.
    """
    machine = Machine.of(config.device, config.dtype, config.compile)
    source = open_source(config)
    source.check_finite()
    tokenizer, prompts = source.need_tokenizer(), prompts_of(config.start, source)
    tasks = [(p, config.seed + k) for p in prompts for k in range(config.num_samples)]
    rows, longest = min(config.batch_size, len(tasks)), max(map(len, prompts))
    sampling = Sampling(config.temperature, config.top_k, config.top_p, config.repetition_penalty)
    model, most = source.model(machine), longest + config.max_new_tokens
    batch = BatchGenerator(model, rows, most, sampling, machine.compile)
    print(source.about, file=sys.stderr)
    started, made, stop = time.perf_counter(), 0, tokenizer.eot if config.stop else None
    for first in range(0, len(tasks), rows):
        part, seeds = zip(*tasks[first : first + rows], strict=True)
        streams = [TextStream(tokenizer, p, config.stop_strings.split("|")) for p in part]
        print(on_screen(streams[0].take()), end="", flush=True)
        for tokens in batch.stream(part, config.max_new_tokens, seeds, stop):
            made += sum(token is not None for token in tokens)
            for row, token in enumerate(tokens):
                if token is not None and streams[row].feed(token):
                    batch.ended.add(row)
            print(on_screen(streams[0].take()), end="", flush=True)
        for stream in streams:
            stream.feed(final=True)
            print(on_screen(stream.take()))
            print(RULE)
    seconds = time.perf_counter() - started
    rate = f"{made / seconds:,.1f} tokens/s, {rows} at a time, {machine.device} {machine.dtype}"
    print(f"{made:,} tokens in {seconds:.1f}s: {rate}", file=sys.stderr)
    return 0
