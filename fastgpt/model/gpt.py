"""GPT-2, and nothing but GPT-2.

Parameters are named as nanoGPT names them. The residual stream is carried in the form that the
fused ops want: every block ends by adding its branch to the stream and normalising for the next,
so one op reads the stream once. Ours also adds the bias that a branch ends with, and drops out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastgpt.config.schema import ModelConfig
from fastgpt.model import ops
from fastgpt_kernels.registry import Sizes

VOCAB_MULTIPLE = 128


@dataclass(frozen=True)
class ModelShape:
    """All that decides which tensors a model has; stored in its checkpoints."""

    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    vocab_size: int
    bias: bool
    gelu: str = "tanh"

    @classmethod
    def of(cls, model: ModelConfig, vocab_size: int) -> ModelShape:
        """What a config asks for. The way back: `settings.replace(config, **vars(shape))`."""
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
        """What the ops of a model of this shape are asked about, for a micro-batch."""
        vocab = self.vocab_size, self.padded_vocab_size
        width = self.n_head, self.n_embd
        return Sizes(batch_size, self.block_size, *width, *vocab, dropout, self.bias, self.gelu)


class _Rounded(torch.autograd.Function):
    """A master's copy in its place: the gradient of the copy, widened, is the master's."""

    @staticmethod
    def forward(ctx: Any, master: Tensor, copy: Tensor) -> Tensor:
        ctx.dtype = master.dtype
        return copy.view_as(copy)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient.to(ctx.dtype), None


class _Embedding(torch.autograd.Function):
    """Rows idx (B, T) of a weight (V, C) that the head reads too, and the weight for the head.

    So its gradient is the head's, to which those of the rows are added: no zeros are filled in and
    no two gradients of the weight's size are summed.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, idx: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(idx)
        return F.embedding(idx, weight), weight.view_as(weight)

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, rows: Tensor, head: Tensor
    ) -> tuple[Tensor, None]:
        (idx,) = ctx.saved_tensors
        if rows.device.type != "cpu":
            return head.index_put((idx,), rows, accumulate=True), None
        # There threads of index_put, and of what Inductor makes of it or of index_add, add to a row
        # in the order in which they come: no two runs would be the same to the bit.
        from fastgpt_kernels.accumulate import adds_rows  # loads the op registry

        total = head.clone()
        adds_rows(total, idx.flatten(), rows.flatten(0, 1))
        return total, None


class _AddingEmbedding(torch.autograd.Function):
    """Rows idx (B, T) of a weight (V, C), whose gradients are added to those of `total`."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, idx: Tensor, total: Tensor) -> Tensor:
        ctx.save_for_backward(idx)
        ctx.total = total  # not saved: autograd would refuse what is changed
        return F.embedding(idx, weight)

    @staticmethod
    def backward(ctx: Any, rows: Tensor) -> tuple[None, None, None]:  # type: ignore[override]
        from fastgpt_kernels.accumulate import adds_rows  # loads the op registry

        (idx,) = ctx.saved_tensors
        adds_rows(ctx.total, idx.flatten(), rows.flatten(0, 1))
        return None, None, None


class Linear(nn.Linear):
    """The parameters of a linear layer, fp32, with copies in 16 bits if the model keeps them.

    weight_sum is the weight's gradient where passes add to it themselves.
    """

    weight_copy: Tensor | None
    bias_copy: Tensor | None
    weight_sum: Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: bool):
        super().__init__(in_features, out_features, bias=bias)
        for name in ("weight_copy", "bias_copy", "weight_sum"):
            self.register_buffer(name, None, persistent=False)

    def read(self) -> tuple[Tensor, Tensor | None]:
        """The weight, and the bias or its copy."""
        if self.bias_copy is None:
            return self.weight, self.bias
        return self.weight, _Rounded.apply(self.bias, self.bias_copy)

    def kept(self) -> dict[str, Tensor]:
        """What the op is told of the weight besides: its copy, and where its gradient goes."""
        return _given(rounded=self.weight_copy, add_to=self.weight_sum)


def _given(**arguments: Tensor | None) -> dict[str, Tensor]:
    return {name: x for name, x in arguments.items() if x is not None}


class LayerNorm(nn.Module):
    """The parameters of a layer norm with an optional bias; the op table computes it."""

    def __init__(self, n_embd: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_embd))
        self.bias = nn.Parameter(torch.zeros(n_embd)) if bias else None


class Attention(nn.Module):
    def __init__(self, shape: ModelShape, dropout: float, table: ops.OpTable):
        super().__init__()
        self.c_attn = Linear(shape.n_embd, 3 * shape.n_embd, bias=shape.bias)
        self.c_proj = Linear(shape.n_embd, shape.n_embd, bias=shape.bias)
        self.n_head, self.dropout, self.ops = shape.n_head, dropout, table

    def forward(self, x: Tensor, seed: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The branch, and its last bias if the norm is to add that and to drop out."""
        dropout_p = self.dropout if self.training else 0.0
        weight, bias = self.c_attn.read()
        more = {}
        # Ours sums the bias's gradient; of others Inductor fuses the sum into the linear layer's.
        if bias is not None and self.ops.ours("attention"):
            bias, more = bias.detach(), {"bias": self.c_attn.bias}
        qkv = self.ops.linear(x, weight, bias, **self.c_attn.kept())
        y = self.ops.attention(qkv, self.n_head, dropout_p=dropout_p, seed=seed, **more)
        weight, bias = self.c_proj.read()
        kept = self.c_proj.kept()
        if self.ops.ours("add_layer_norm"):
            return self.ops.linear(y, weight, **kept), bias
        y = self.ops.linear(y, weight, bias, **kept)
        return F.dropout(y, self.dropout, self.training), None


class MLP(nn.Module):
    def __init__(self, shape: ModelShape, dropout: float, table: ops.OpTable):
        super().__init__()
        self.c_fc = Linear(shape.n_embd, 4 * shape.n_embd, bias=shape.bias)
        self.c_proj = Linear(4 * shape.n_embd, shape.n_embd, bias=shape.bias)
        self.approximate = "none" if shape.gelu == "erf" else "tanh"
        self.dropout, self.ops = dropout, table

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """As `Attention.forward`."""
        weight, bias = self.c_proj.read()
        fc = *self.c_fc.read(), weight
        first, second = self.c_fc.kept(), self.c_proj.kept()  # of the same
        kept = {name: (first[name], second[name]) for name in first}
        if self.ops.ours("add_layer_norm"):
            return self.ops.mlp(x, *fc, None, self.approximate, **kept), bias
        y = self.ops.mlp(x, *fc, bias, self.approximate, **kept)
        return F.dropout(y, self.dropout, self.training), None


class Block(nn.Module):
    def __init__(self, shape: ModelShape, dropout: float, table: ops.OpTable):
        super().__init__()
        self.ln_1 = LayerNorm(shape.n_embd, shape.bias)
        self.attn = Attention(shape, dropout, table)
        self.ln_2 = LayerNorm(shape.n_embd, shape.bias)
        self.mlp = MLP(shape, dropout, table)
        self.dropout, self.ops = dropout, table

    def forward(
        self, y: Tensor, x: Tensor, next_norm: LayerNorm, seeds: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """y: the stream x after ln_1. Returns the stream after this block, normalised and plain.

        seeds (3, 1) int64 of the block's dropout, or None for PyTorch's generator.
        """
        a, b, c = (None, None, None) if seeds is None else seeds
        y, x = self._add(self.attn(y, a), x, self.ln_2, b)
        return self._add(self.mlp(y), x, next_norm, c)

    def _add(
        self,
        branch: tuple[Tensor, Tensor | None],
        x: Tensor,
        norm: LayerNorm,
        seed: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        y, bias = branch
        if not self.ops.ours("add_layer_norm"):
            return self.ops.add_layer_norm(y, x, norm.weight, norm.bias)
        p = self.dropout if self.training else 0.0
        return self.ops.add_layer_norm(y, x, norm.weight, norm.bias, bias, dropout_p=p, seed=seed)


class Transformer(nn.Module):
    """The named parts; `GPT` puts them to work."""

    def __init__(self, shape: ModelShape, dropout: float, table: ops.OpTable):
        super().__init__()
        self.wte = nn.Embedding(shape.padded_vocab_size, shape.n_embd)
        self.wpe = nn.Embedding(shape.block_size, shape.n_embd)
        self.h = nn.ModuleList(Block(shape, dropout, table) for _ in range(shape.n_layer))
        self.ln_f = LayerNorm(shape.n_embd, shape.bias)


class GPT(nn.Module):
    """GPT-2: token and position embeddings, pre-norm blocks, final norm, head tied to the tokens'.

    With targets (B, T) `forward` returns the mean loss (fp32 scalar; targets of -1 do not count);
    without, the logits (B, T, vocab_size). T is at most block_size.

    Parameters are fp32 masters; `dtype` is that of activations, the residual stream and what the
    matmuls read: masters rounded in each pass, or copies that `keep_copies` makes. Norm statistics,
    softmax and the loss are fp32 in any case.
    """

    def __init__(
        self,
        shape: ModelShape,
        dropout: float = 0.0,
        table: ops.OpTable | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        table = table or ops.choose(torch.device("cpu"))
        self.shape, self.dropout, self.ops, self.dtype = shape, dropout, table, dtype
        # Keep only what stands between blocks, and run each block again in the backward pass.
        self.checkpointing = False
        self.transformer = Transformer(shape, dropout, table)
        self.head_copy: Tensor | None
        self.head_sum: Tensor | None
        for name in ("head_copy", "head_sum"):
            self.register_buffer(name, None, persistent=False)

    @torch.no_grad()
    def init_weights(self, seed: int) -> GPT:
        """GPT-2's initialisation: N(0, 0.02), residual projections N(0, 0.02 / sqrt(2 n_layer)).

        Drawn on the CPU, so that a seed means the same weights on every device. Rows of the
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

    def keep_copies(self) -> None:
        """Let products read copies in `dtype`, which follow the masters by `copy_masters`.

        Of what would be rounded in each pass: our linear layers take masters. Who changes masters
        other than by loading a state dict calls `copy_masters`.
        """
        eager = {c.op for c in self.ops.choices if c.implementation == "eager"}
        if self.dtype == torch.float32:
            return
        if "linear_cross_entropy" not in eager:
            self.head_copy = self.transformer.wte.weight.detach().to(self.dtype)
        for name, layer in self.named_modules():
            op = "mlp" if ".mlp." in name and "mlp" not in eager else "linear"
            if not isinstance(layer, Linear) or op not in eager:
                continue
            layer.weight_copy = layer.weight.detach().to(self.dtype)
            # Ours read biases of any dtype.
            gelu = name.endswith("c_fc") and "bias_gelu" not in eager
            norm = name.endswith("c_proj") and "add_layer_norm" not in eager
            if layer.bias is not None and not gelu and not norm:
                layer.bias_copy = layer.bias.detach().to(self.dtype)
        self.register_load_state_dict_post_hook(lambda model, _: model.copy_masters())

    def keep_sums(self) -> None:
        """Let backward passes add to gradients that stay, of weights that have copies.

        Whoever uses the model leaves these `.grad` in their places, and zeroes them.
        """
        layers = [m for m in self.modules() if isinstance(m, Linear)]
        for layer in layers:
            if layer.weight_copy is not None:
                layer.weight.grad = layer.weight_sum = torch.zeros_like(layer.weight)
        if self.head_copy is not None:
            weight = self.transformer.wte.weight
            weight.grad = self.head_sum = torch.zeros_like(weight)

    def copies(self) -> dict[Tensor, Tensor]:
        """The copy of each master that has one."""
        layers = [m for m in self.modules() if isinstance(m, Linear)]
        pairs = [p for m in layers for p in ((m.weight, m.weight_copy), (m.bias, m.bias_copy))]
        pairs.append((self.transformer.wte.weight, self.head_copy))
        return {master: copy for master, copy in pairs if copy is not None}

    @torch.no_grad()
    def copy_masters(self) -> None:
        """Round the masters into their copies, if there are any."""
        if copies := self.copies():
            torch._foreach_copy_([*copies.values()], [*copies])

    def n_params(self, position_embeddings: bool = False) -> int:
        """Number of parameters; without the position embeddings it is the N of 6N."""
        total = sum(p.numel() for p in self.parameters())
        return total if position_embeddings else total - self.transformer.wpe.weight.numel()

    def hidden(self, idx: Tensor) -> Tensor:
        """Token ids (B, T) -> the final norm's output (B, T, C)."""
        return self._hidden(self.transformer.wte(idx))

    def _hidden(self, embedded: Tensor) -> Tensor:
        """Embedded tokens (B, T, C), fp32 -> the final norm's output (B, T, C)."""
        t, seq_len = self.transformer, embedded.shape[1]
        if seq_len > self.shape.block_size:
            raise ValueError(f"{seq_len} tokens do not fit block_size={self.shape.block_size}")
        x = (embedded + t.wpe.weight[:seq_len]).to(self.dtype)
        x = F.dropout(x, self.dropout, self.training)
        blocks = [cast(Block, block) for block in t.h]
        norms = [block.ln_1 for block in blocks[1:]] + [t.ln_f]
        y = self.ops.layer_norm(x, blocks[0].ln_1.weight, blocks[0].ln_1.bias)
        seeds: Sequence[Tensor | None] = [None] * len(blocks)
        if self.training and self.dropout and self.ops.ours("add_layer_norm"):
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
        """(..., C) -> (..., vocab_size): the padding never leaves the model."""
        weight = self.transformer.wte.weight[: self.shape.vocab_size]
        return F.linear(hidden, weight.to(hidden.dtype))

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        if targets is None:
            return self.logits(self.hidden(idx))
        weight = self.transformer.wte.weight
        if self.head_sum is None:
            embedded, weight = _Embedding.apply(weight, idx)
        else:
            embedded = _AddingEmbedding.apply(weight, idx, self.head_sum)
        y, vocab_size = self._hidden(embedded), self.shape.vocab_size
        kept = _given(rounded=self.head_copy, add_to=self.head_sum)
        return self.ops.linear_cross_entropy(y, weight, targets, vocab_size=vocab_size, **kept)
