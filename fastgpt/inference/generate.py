"""Text from a model: drawing tokens, many rows at once, with a cache and on a GPU a CUDA graph.

While a text fits block_size, a token costs one pass over the weights. A longer text is continued
from its last block_size tokens, as nanoGPT does. GPT-2's positions are absolute, so every key and
value changes as the window moves, and each token costs a forward pass over the whole window.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fastgpt.inference.decode import Decoder
from fastgpt.model.gpt import GPT


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from its logits.

    temperature         the logits are divided by it; 0: the likeliest token, no drawing
    top_k               only the k likeliest tokens (0: all)
    top_p               only the smallest set that holds this probability (Holtzman et al. 2020)
    repetition_penalty  positive logits of tokens that are already in the text are divided by it,
                        negative ones multiplied (Keskar et al. 2019); 1: off
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0


def draw(logits: Tensor, uniform: Tensor, sampling: Sampling, seen: Tensor | None = None) -> Tensor:
    """Next tokens (B,) from logits (B, V) and numbers (B,) uniform in [0, 1).

    seen (B, V) bool: which tokens a row holds; needed for a repetition penalty. The draw is the
    inverse of the distribution function, so one number a token decides, on any device.
    """
    logits = logits.float()
    if sampling.repetition_penalty != 1.0 and seen is not None:
        r = sampling.repetition_penalty
        logits = torch.where(seen, torch.where(logits > 0, logits / r, logits * r), logits)
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        kth = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    probs = logits.softmax(-1)
    if sampling.top_p < 1:
        ordered, ids = probs.sort(dim=-1, descending=True, stable=True)
        # A token stays if those before it hold less than top_p: the likeliest one always does.
        ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= sampling.top_p, 0.0)
        probs = torch.zeros_like(probs).scatter_(1, ids, ordered)
    # In fp64 (which MPS lacks) u * total < total for every fp32 u < 1.
    total = probs.cumsum(-1, dtype=torch.float32 if probs.device.type == "mps" else torch.float64)
    wanted = uniform.to(total.dtype).unsqueeze(1) * total[:, -1:]
    found = torch.searchsorted(total, wanted, right=True).squeeze(1)
    return found.clamp(max=logits.shape[-1] - 1)


def uniforms(seeds: Sequence[int], n: int) -> Tensor:
    """(rows, n) fp32 in [0, 1) on the CPU: row r depends on seeds[r] alone."""
    rows = [torch.rand(n, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows)


class BatchGenerator:
    """Continues `batch_size` prompts at a time, each of its own length; can be used many times.

    model       its weights as they are now; dropout is off whatever its mode
    max_tokens  the longest text, prompt included, that will be asked for
    compiled    torch.compile the decode step
    graph       replay the decode step as one CUDA graph; None: on a GPU

    The same seed gives the same text if the logits agree.
    """

    def __init__(
        self,
        model: GPT,
        batch_size: int,
        max_tokens: int,
        sampling: Sampling | None = None,
        *,
        compiled: bool = False,
        graph: bool | None = None,
    ):
        self.block_size, self.vocab_size = model.shape.block_size, model.shape.vocab_size
        self.sampling = sampling or Sampling()
        self.decoder = Decoder(model, batch_size, min(max_tokens, self.block_size))
        device = self.decoder.wte.device
        self.device, self.max_tokens, self.batch_size = device, max_tokens, batch_size
        # All that a step reads and writes keeps its address, so that a graph can be replayed.
        self.ids = torch.zeros(batch_size, max_tokens, dtype=torch.int64, device=device)
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.tokens = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.uniform = torch.zeros(batch_size, max_tokens, device=device)
        self.drawn = torch.zeros(1, dtype=torch.int64, device=device)
        penalty, size = self.sampling.repetition_penalty, (batch_size, self.vocab_size)
        self.seen = torch.zeros(size, dtype=torch.bool, device=device) if penalty != 1.0 else None
        self.compiled, self.graphed = compiled, device.type == "cuda" if graph is None else graph
        self._step = torch.compile(self.decoder.step) if compiled else self.decoder.step
        self._graph: torch.cuda.CUDAGraph | None = None

    @torch.no_grad()
    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        seeds: Sequence[int],
        stop_token: int | None = None,
        ended: set[int] | None = None,
    ) -> Iterator[list[int | None]]:
        """Yield the next token of every row until all have ended; None if a row has ended.

        A row ends before its stop_token, after max_new_tokens, or once the caller has put its
        number into `ended`.
        """
        self._begin(prompts, max_new_tokens, seeds)
        ended = set() if ended is None else ended
        for tokens in self._ahead(prompts, max_new_tokens):
            ended |= {row for row, token in enumerate(tokens) if token == stop_token}
            if len(ended) == self.batch_size:
                return
            yield [None if row in ended else token for row, token in enumerate(tokens)]

    def _ahead(self, prompts, max_new_tokens: int) -> Iterator[list[int]]:
        """Tokens (B,) of every step on the host.

        A GPU is given the next step before the last one's tokens are waited for, so that it never
        idles while the host looks at them. If all rows had ended, that step was for nothing.
        """
        waiting: tuple[Tensor, torch.cuda.Event] | None = None
        for i in range(max_new_tokens):
            if i == 0:  # of each prompt the model sees the last block_size tokens
                self._draw(self.decoder.prefill([p[-self.block_size :] for p in prompts]))
            else:
                self._next([len(p) + i for p in prompts])
            if self.device.type != "cuda":
                yield self.tokens.tolist()
                continue
            host = torch.empty(self.batch_size, dtype=torch.int64, pin_memory=True)
            host.copy_(self.tokens, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            if waiting is not None:
                waiting[1].synchronize()
                yield waiting[0].tolist()
            waiting = host, event
        if waiting is not None:
            waiting[1].synchronize()
            yield waiting[0].tolist()

    def _begin(self, prompts, max_new_tokens: int, seeds: Sequence[int]) -> None:
        longest = max(len(p) for p in prompts) + max_new_tokens
        if len(prompts) != self.batch_size or len(seeds) != self.batch_size:
            raise ValueError(
                f"{len(prompts)} prompts and {len(seeds)} seeds: wanted {self.batch_size} of each"
            )
        if longest > self.max_tokens or not all(prompts):
            raise ValueError(f"texts of {longest} tokens: wanted at most {self.max_tokens}")
        texts = pad_sequence([torch.tensor(list(p)) for p in prompts], batch_first=True)
        self.ids[:, : texts.shape[1]] = texts.to(self.device)
        self.lengths.copy_(torch.tensor([len(p) for p in prompts]))
        self.uniform[:, :max_new_tokens] = uniforms(seeds, max_new_tokens).to(self.device)
        self.drawn.zero_()
        if self.seen is not None:
            self.seen.zero_()
            for row, prompt in enumerate(prompts):
                self.seen[row, self.ids[row, : len(prompt)]] = True

    def _draw(self, logits: Tensor) -> None:
        """Draw from logits (B, V), and append to every row."""
        uniform = self.uniform.index_select(1, self.drawn).squeeze(1)
        tokens = draw(logits, uniform, self.sampling, self.seen)
        self.tokens.copy_(tokens)
        self.ids.scatter_(1, self.lengths.unsqueeze(1), tokens.unsqueeze(1))
        if self.seen is not None:
            self.seen.scatter_(1, tokens.unsqueeze(1), True)
        self.lengths += 1
        self.drawn += 1

    def _next(self, lengths: list[int]) -> None:
        """One more token on every row; `lengths` are those of the texts so far."""
        past = [row for row, n in enumerate(lengths) if n > self.block_size]
        if not past and self.graphed:
            return self._replay()
        if not past:
            # A compiled step would be compiled again for every value of a bound that grows.
            return self._draw(self._step(self.tokens, None if self.compiled else max(lengths)))
        T = self.block_size
        ids = torch.stack([self.ids[row, lengths[row] - T : lengths[row]] for row in past])
        logits = self.decoder.windows(ids)
        if len(past) < len(lengths):
            slid, logits = logits, self._step(self.tokens).clone()
            logits[past] = slid
        self._draw(logits)

    def _replay(self) -> None:
        """One cached step as a CUDA graph, which is captured the first time."""
        if self._graph is None:
            state = [self.ids, self.lengths, self.tokens, self.drawn, self.decoder.positions]
            state += [self.seen] if self.seen is not None else []
            before = [t.clone() for t in state]
            # Compile and load all kernels on a side stream first; then undo these steps. What they
            # wrote to the cache lies past the rows' lengths, or is written again alike.
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):
                    self._draw(self._step(self.tokens))
                    for t, value in zip(state, before, strict=True):
                        t.copy_(value)
            torch.cuda.current_stream().wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._draw(self._step(self.tokens))
            for t, value in zip(state, before, strict=True):
                t.copy_(value)
        self._graph.replay()


def generate(
    model: GPT,
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    stop_token: int | None = None,
) -> Iterator[int]:
    """Yield up to max_new_tokens ids that continue one prompt (at least one id).

    The model sees the last block_size tokens. Ends before stop_token if one is given.
    """
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty)
    batch = BatchGenerator(model, 1, len(prompt) + max_new_tokens, sampling)
    for (token,) in batch.stream([prompt], max_new_tokens, seeds=[seed], stop_token=stop_token):
        if token is not None:
            yield token
