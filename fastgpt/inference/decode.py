"""The model one token at a time: a cache keeps the keys and values of the tokens seen so far.

The cache has a fixed number of positions, so every step has the same shapes and can be one CUDA
graph. Rows are independent: row b holds positions[b] tokens, and its next token goes to that
position. Prompts are padded on the right, which causal attention never looks at, and go through the
training attention all at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from fastgpt.model.gpt import GPT, Block, LayerNorm


@dataclass(frozen=True)
class Layer:
    """One block's weights in the dtype of the activations; norms as they are."""

    attn_norm: LayerNorm
    attn_in: tuple[Tensor, Tensor | None]
    attn_out: tuple[Tensor, Tensor | None]
    mlp_norm: LayerNorm
    mlp_in: tuple[Tensor, Tensor | None]
    mlp_out: tuple[Tensor, Tensor | None]


class Decoder:
    """A model with a cache of `max_len` positions for each of `batch_size` rows.

    `prefill` starts all rows, `step` extends each by one token, `windows` computes without a cache.
    All return logits (rows, vocab_size) of the next token, in the model's dtype. Not for training:
    the weights are taken as they are now.
    """

    def __init__(self, model: GPT, batch_size: int, max_len: int):
        shape, dtype = model.shape, model.dtype
        if not 1 <= max_len <= shape.block_size:
            raise ValueError(f"max_len={max_len}: wanted 1 .. block_size={shape.block_size}")
        self.shape, self.dtype, self.ops = shape, dtype, model.ops
        self.batch_size, self.max_len = batch_size, max_len
        t = model.transformer
        self.wte, self.wpe = t.wte.weight.detach(), t.wpe.weight.detach()
        self.head = self.wte[: shape.vocab_size].to(dtype)
        self.final_norm = t.ln_f
        self.layers = [self._layer(cast(Block, block)) for block in t.h]
        device = self.wte.device
        size = (shape.n_layer, 2, batch_size, shape.n_head, max_len, shape.head_dim)
        self.cache = torch.zeros(size, dtype=dtype, device=device)
        self.positions = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.rows = torch.arange(batch_size, device=device)

    def _layer(self, block: Block) -> Layer:
        def cast_linear(layer: torch.nn.Linear) -> tuple[Tensor, Tensor | None]:
            bias = None if layer.bias is None else layer.bias.detach().to(self.dtype)
            return layer.weight.detach().to(self.dtype), bias

        attn, mlp = block.attn, block.mlp
        attn_linears = cast_linear(attn.c_attn), cast_linear(attn.c_proj)
        mlp_linears = cast_linear(mlp.c_fc), cast_linear(mlp.c_proj)
        return Layer(block.ln_1, *attn_linears, block.ln_2, *mlp_linears)

    def _hidden(self, x: Tensor, attend: Callable[[int, Tensor], Tensor]) -> Tensor:
        """Embeddings (..., C) -> the final norm's output; attend(layer, qkv (..., 3*C)) -> y."""
        ops, layers = self.ops, self.layers
        x = x.to(self.dtype)
        approximate = "none" if self.shape.gelu == "erf" else "tanh"
        norms = [layer.attn_norm for layer in layers[1:]] + [self.final_norm]
        y = ops.layer_norm(x, layers[0].attn_norm.weight, layers[0].attn_norm.bias)
        for i, (layer, norm) in enumerate(zip(layers, norms, strict=True)):
            branch = F.linear(attend(i, F.linear(y, *layer.attn_in)), *layer.attn_out)
            y, x = ops.add_layer_norm(branch, x, layer.mlp_norm.weight, layer.mlp_norm.bias)
            weight, bias = layer.mlp_in
            h = ops.bias_gelu(F.linear(y, weight), bias, approximate)
            y, x = ops.add_layer_norm(F.linear(h, *layer.mlp_out), x, norm.weight, norm.bias)
        return y

    def _last_logits(self, ids: Tensor, lengths: Tensor, *, keep: bool) -> Tensor:
        """Logits after the first lengths[b] of ids[b] (B, T); `keep` puts all T in the cache."""
        (B, T), H, D = ids.shape, self.shape.n_head, self.shape.head_dim

        def attend(i: int, qkv: Tensor) -> Tensor:
            if keep:
                keys_values = qkv.view(B, T, 3, H, D).permute(2, 0, 3, 1, 4)[1:]
                self.cache[i, :, :, :, :T] = keys_values
            return self.ops.attention(qkv, H)

        y = self._hidden(self.wte[ids] + self.wpe[: ids.shape[1]], attend)
        return F.linear(y[torch.arange(len(ids), device=ids.device), lengths - 1], self.head)

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Start every row with its prompt, of 1 to max_len tokens each; logits (B, V)."""
        lengths = [len(p) for p in prompts]
        if len(prompts) != self.batch_size or not all(1 <= n <= self.max_len for n in lengths):
            raise ValueError(
                f"prompts of {lengths} tokens: wanted {self.batch_size}, of 1 .. {self.max_len}"
            )
        ids = pad_sequence([torch.tensor(list(p)) for p in prompts], batch_first=True)
        self.positions.copy_(torch.tensor(lengths))
        return self._last_logits(ids.to(self.wte.device), self.positions, keep=True)

    @torch.no_grad()
    def step(self, tokens: Tensor, limit: int | None = None) -> Tensor:
        """Extend row b by tokens[b] (int64, on the device); logits (B, V).

        Every position must be below max_len, or the row's cache is spent and its logits mean
        nothing. `limit`, if the caller knows it, bounds the positions that any row has after this
        step: the CPU then looks at no more of the cache than that.
        """
        B, H, D = self.batch_size, self.shape.n_head, self.shape.head_dim
        S = self.max_len if limit is None else min(limit, self.max_len)
        at = self.positions.clamp(max=self.max_len - 1)
        seen = torch.arange(S, device=at.device) <= at.view(B, 1, 1, 1)  # (B, 1, 1, S)

        def attend(i: int, qkv: Tensor) -> Tensor:
            q, k, v = qkv.view(B, 3, H, D).unbind(1)
            keys, values = self.cache[i]
            keys[self.rows, :, at], values[self.rows, :, at] = k, v
            q, keys, values = q.unsqueeze(2), keys[:, :, :S], values[:, :, :S]
            return F.scaled_dot_product_attention(q, keys, values, seen).reshape(B, H * D)

        logits = F.linear(self._hidden(self.wte[tokens] + self.wpe[at], attend), self.head)
        self.positions += 1
        return logits

    @torch.no_grad()
    def windows(self, ids: Tensor) -> Tensor:
        """Logits (rows, V) after full windows ids (rows, T), T <= block_size; no cache."""
        lengths = torch.full((len(ids),), ids.shape[1], device=ids.device)
        return self._last_logits(ids, lengths, keep=False)
