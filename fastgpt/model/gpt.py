"""GPT-2, and nothing but GPT-2.

Parameters have nanoGPT's names. Every block ends by adding its branch to the residual stream and
normalising for the next block, so one op reads the stream once. The Triton kernel of this op also
adds the bias that a branch ends with, and drops out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastgpt.config.schema import ModelConfig
from fastgpt.model.kernels import Kernels, select
from fastgpt_kernels.linear import linear, tied_embedding
from fastgpt_kernels.registry import Sizes

VOCAB_MULTIPLE = 128


@dataclass(frozen=True)
class ModelShape:
    """Shape of a model: the sizes that decide its tensors, stored in its checkpoints."""

    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    vocab_size: int
    bias: bool
    gelu: str = "tanh"

    @classmethod
    def of(cls, model: ModelConfig, vocab_size: int) -> ModelShape:
        """Returns a config's shape. `settings.replace(config, **vars(shape))` is the way back."""
        asked = {f.name: getattr(model, f.name) for f in fields(cls)}
        return cls(**asked | {"vocab_size": vocab_size})

    def __str__(self) -> str:
        biases = "with biases" if self.bias else "no biases"
        return (
            f"{self.n_layer} layers, {self.n_head} heads, {self.n_embd} wide, {self.block_size:,} "
            f"positions, vocabulary {self.vocab_size:,}, {biases}, {self.gelu} GELU"
        )

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: the vocabulary rounded up so that matmul tiles are whole."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    def sizes(self, batch_size: int, dropout: float = 0.0) -> Sizes:
        """Returns the sizes at which a model of this shape calls its ops, for a micro-batch."""
        vocab = self.vocab_size, self.padded_vocab_size
        width = self.n_head, self.n_embd
        return Sizes(batch_size, self.block_size, *width, *vocab, dropout, self.bias, self.gelu)


class Linear(nn.Linear):
    """Linear layer, fp32. The matmuls read the 16-bit copy of its weight if there is one.

    weight_bf16 and main_grad are those of `fastgpt_kernels.linear`.
    """

    weight_bf16: Tensor | None = None
    main_grad: Tensor | None = None

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        """Returns x W^T + bias. The bias is given, since some are left to the op that follows."""
        return linear(x, self.weight, bias, self.weight_bf16, self.main_grad)


class TokenEmbedding(nn.Embedding):
    """Token embedding, which is the head's weight too; with the tensors of `Linear`."""

    weight_bf16: Tensor | None = None
    main_grad: Tensor | None = None


class LayerNorm(nn.Module):
    """Parameters of a layer norm with an optional bias, which the kernels compute."""

    def __init__(self, n_embd: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_embd))
        self.bias = nn.Parameter(torch.zeros(n_embd)) if bias else None


class Attention(nn.Module):
    def __init__(self, shape: ModelShape, dropout: float, kernels: Kernels):
        super().__init__()
        self.c_attn = Linear(shape.n_embd, 3 * shape.n_embd, bias=shape.bias)
        self.c_proj = Linear(shape.n_embd, shape.n_embd, bias=shape.bias)
        self.n_head, self.dropout, self.kernels = shape.n_head, dropout, kernels

    def forward(self, x: Tensor, seed: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Returns the branch, and c_proj's bias if `add_layer_norm` is to add that."""
        bias: Tensor | None = self.c_attn.bias
        given: dict[str, Tensor | None] = {}
        if self.kernels.uses_triton("attention"):
            # It sums the bias's gradient; elsewhere Inductor fuses that into the linear layer.
            given = {"seed": seed, "bias": bias}
            bias = None if bias is None else bias.detach()
        dropout_p = self.dropout if self.training else 0.0
        y = self.kernels.attention(self.c_attn(x, bias), self.n_head, dropout_p=dropout_p, **given)
        if self.kernels.uses_triton("add_layer_norm"):
            return self.c_proj(y, None), self.c_proj.bias
        return self.c_proj(y, self.c_proj.bias), None


class MLP(nn.Module):
    def __init__(self, shape: ModelShape, kernels: Kernels):
        super().__init__()
        self.c_fc = Linear(shape.n_embd, 4 * shape.n_embd, bias=shape.bias)
        self.c_proj = Linear(4 * shape.n_embd, shape.n_embd, bias=shape.bias)
        self.approximate = "none" if shape.gelu == "erf" else "tanh"
        self.kernels = kernels

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns the same as `Attention.forward`."""
        fc, proj = self.c_fc, self.c_proj
        fused = self.kernels.uses_triton("add_layer_norm")  # it adds c_proj's bias
        y = self.kernels.mlp(
            x, fc.weight, fc.bias, proj.weight, None if fused else proj.bias, self.approximate,
            weights_bf16=(fc.weight_bf16, proj.weight_bf16),
            main_grads=(fc.main_grad, proj.main_grad),
            bias_gelu=self.kernels.bias_gelu,
        )  # fmt: skip
        return y, proj.bias if fused else None


class Block(nn.Module):
    def __init__(self, shape: ModelShape, dropout: float, kernels: Kernels):
        super().__init__()
        self.ln_1 = LayerNorm(shape.n_embd, shape.bias)
        self.attn = Attention(shape, dropout, kernels)
        self.ln_2 = LayerNorm(shape.n_embd, shape.bias)
        self.mlp = MLP(shape, kernels)
        self.dropout, self.kernels = dropout, kernels

    def forward(
        self, y: Tensor, x: Tensor, next_norm: LayerNorm, seeds: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns the stream after this block, normalised and plain, for x and y = ln_1(x).

        seeds (3, 1) int64 of the block's dropout, or None for PyTorch's generator.
        """
        a, b, c = (None, None, None) if seeds is None else seeds
        branch, bias = self.attn(y, a)
        y, x = self._add_norm(branch, bias, x, self.ln_2, b)
        branch, bias = self.mlp(y)
        return self._add_norm(branch, bias, x, next_norm, c)

    def _add_norm(
        self, y: Tensor, bias: Tensor | None, x: Tensor, norm: LayerNorm, seed: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Drops out of the branch y, adds it to the stream x, and normalises."""
        weights = norm.weight, norm.bias
        if not self.kernels.uses_triton("add_layer_norm"):
            y = F.dropout(y, self.dropout, self.training)
            return self.kernels.add_layer_norm(y, x, *weights)
        p = self.dropout if self.training else 0.0
        return self.kernels.add_layer_norm(y, x, *weights, bias, dropout_p=p, seed=seed)


class Transformer(nn.Module):
    """Named parts of GPT-2, which `GPT` puts to work."""

    def __init__(self, shape: ModelShape, dropout: float, kernels: Kernels):
        super().__init__()
        self.wte = TokenEmbedding(shape.padded_vocab_size, shape.n_embd)
        self.wpe = nn.Embedding(shape.block_size, shape.n_embd)
        self.h = nn.ModuleList(Block(shape, dropout, kernels) for _ in range(shape.n_layer))
        self.ln_f = LayerNorm(shape.n_embd, shape.bias)


class GPT(nn.Module):
    """GPT-2: token and position embeddings, pre-norm blocks, final norm, head tied to the tokens'.

    With targets (B, T) `forward` returns the mean loss (fp32 scalar; targets of -1 do not count);
    without, the logits (B, T, vocab_size). T is at most block_size.

    Parameters are fp32 masters. `dtype` is that of activations, the residual stream and the weights
    that matmuls read, rounded in each pass or by `sync_weight_copies`. Norm statistics, softmax and
    the loss are fp32 in any case.
    """

    def __init__(
        self,
        shape: ModelShape,
        dropout: float = 0.0,
        kernels: Kernels | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        kernels = kernels or select(torch.device("cpu"))
        self.shape, self.dropout, self.kernels, self.dtype = shape, dropout, kernels, dtype
        self.checkpointing = False  # True: the backward pass runs each block again
        self.weight_copies: dict[Tensor, Tensor] = {}
        self.transformer = Transformer(shape, dropout, kernels)

    @torch.no_grad()
    def init_weights(self, seed: int) -> GPT:
        """Draws GPT-2's N(0, 0.02), and N(0, 0.02 / sqrt(2 n_layer)) for residual projections.

        It does so on the CPU, so that a seed means the same weights on every device. Rows of the
        embedding past the vocabulary are zero.
        """
        generator = torch.Generator().manual_seed(seed)
        residual_std = 0.02 / math.sqrt(2 * self.shape.n_layer)
        for name, p in self.named_parameters():
            if p.ndim == 1:
                p.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            std = residual_std if name.endswith("c_proj.weight") else 0.02
            p.copy_(torch.empty(p.shape).normal_(0.0, std, generator=generator))
        self.transformer.wte.weight[self.shape.vocab_size :] = 0.0
        return self

    def make_weight_copies(self) -> None:
        """Makes copies in `dtype` of the weights that matmuls read, if that is of 16 bits.

        A caller that changes weights, except by loading a state dict, calls `sync_weight_copies`.
        """
        if self.dtype == torch.float32:
            return
        for module in self._matmul_weights():
            module.weight_bf16 = module.weight.detach().to(self.dtype)
            self.weight_copies[module.weight] = module.weight_bf16
        self.register_load_state_dict_post_hook(lambda model, _: model.sync_weight_copies())

    @torch.no_grad()
    def sync_weight_copies(self) -> None:
        """Rounds the weights into their copies, if there are any."""
        if self.weight_copies:
            torch._foreach_copy_([*self.weight_copies.values()], [*self.weight_copies])

    def use_main_grads(self) -> None:
        """Lets backward passes add to gradients that stay, of weights that have copies.

        The caller leaves these `.grad` in place, and zeroes them.
        """
        for module in self._matmul_weights():
            if module.weight_bf16 is not None:
                module.weight.grad = module.main_grad = torch.zeros_like(module.weight)

    def _matmul_weights(self) -> list[Linear | TokenEmbedding]:
        """Returns the modules whose weights a matmul reads; eager losses round the head's own."""
        found: list[Linear | TokenEmbedding] = [m for m in self.modules() if isinstance(m, Linear)]
        fused = self.kernels.uses_triton("linear_cross_entropy")
        return [self.transformer.wte, *found] if fused else found

    def n_params(self, position_embeddings: bool = False) -> int:
        """Returns the number of parameters, N in 6N if without the position embeddings."""
        total = sum(p.numel() for p in self.parameters())
        return total if position_embeddings else total - self.transformer.wpe.weight.numel()

    def hidden(self, idx: Tensor) -> Tensor:
        """Returns the final norm's output (B, T, C) for token ids (B, T)."""
        return self._hidden(self.transformer.wte(idx))

    def _hidden(self, embedded: Tensor) -> Tensor:
        """Returns the final norm's output (B, T, C) for embedded tokens (B, T, C), fp32."""
        t, seq_len = self.transformer, embedded.shape[1]
        if seq_len > self.shape.block_size:
            raise ValueError(f"{seq_len} tokens do not fit block_size={self.shape.block_size}")
        x = (embedded + t.wpe.weight[:seq_len]).to(self.dtype)
        x = F.dropout(x, self.dropout, self.training)
        blocks = [cast(Block, block) for block in t.h]
        norms = [block.ln_1 for block in blocks[1:]] + [t.ln_f]
        y = self.kernels.layer_norm(x, blocks[0].ln_1.weight, blocks[0].ln_1.bias)
        seeds: Sequence[Tensor | None] = [None] * len(blocks)
        if self.training and self.dropout and self.kernels.uses_triton("add_layer_norm"):
            # All at once, 16 bytes apart: kernels may take what is so aligned for granted.
            drawn = torch.randint(2**63 - 1, (len(blocks), 3, 2), device=x.device)
            seeds = drawn[..., :1].unbind()
        for block, norm, own in zip(blocks, norms, seeds, strict=True):
            if self.checkpointing and torch.is_grad_enabled():
                y, x = cast(tuple, checkpoint(block, y, x, norm, own, use_reentrant=False))
            else:
                y, x = block(y, x, norm, own)
        return y

    def logits(self, hidden: Tensor) -> Tensor:
        """Returns logits (..., vocab_size) for (..., C), without those of the padding."""
        weight = self.transformer.wte.weight[: self.shape.vocab_size]
        return F.linear(hidden, weight.to(hidden.dtype))

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        if targets is None:
            return self.logits(self.hidden(idx))
        wte, given = self.transformer.wte, {}
        if wte.weight_bf16 is not None:
            given = {"weight_bf16": wte.weight_bf16, "main_grad": wte.main_grad}
        embedded, weight = tied_embedding(wte.weight, idx, wte.main_grad)
        return self.kernels.linear_cross_entropy(
            self._hidden(embedded), weight, targets, vocab_size=self.shape.vocab_size, **given
        )
