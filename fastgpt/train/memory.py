"""Memory of a training step by estimate, and the largest micro-batch that fits.

For M tokens per micro-batch, width C, padded vocabulary V and e bytes per activation, the fused ops
save for the backward pass

    per block   16 M C e    norm 1, qkv 3, attention 1, stream 1, norm 1, MLP 4 + 4, stream 1
    loss        M C e       its gradient; and 4 V C bytes for the head's gradient

and in fp32 the log-sum-exp of attention's rows and two statistics per norm. The eager ops also save
the norm's input in fp32, a copy of attention's output, and all logits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgpt.config.schema import Config
from fastgpt.errors import UserError
from fastgpt.model.device import Machine
from fastgpt.model.gpt import GPT, ModelShape


@dataclass(frozen=True)
class Estimate:
    """Bytes at the peak of a step, which is the end of the forward pass."""

    weights: int  # fp32
    gradients: int  # fp32, allocated by an earlier micro-batch
    optimizer: int  # fp32 moments: two of AdamW, one of Muon's matrices
    casts: int  # weights in the compute dtype
    activations: int  # saved by the blocks for the backward pass
    loss: int  # the head's gradients and logits
    working: int  # gradients inside one block, or with checkpointing the block's activations

    @property
    def total(self) -> int:
        return sum(vars(self).values())

    def __str__(self) -> str:
        parts = ", ".join(f"{k} {v / 2**30:.2f}" for k, v in vars(self).items())
        return f"{self.total / 2**30:.2f} GiB ({parts})"


def n_parameters(shape: ModelShape) -> int:
    """Returns the number of parameters, position embeddings and padding included."""
    C, L = shape.n_embd, shape.n_layer
    vectors = (2 * L + 1) * C + (shape.bias and (2 * L + 1) * C + L * 9 * C)
    return (shape.padded_vocab_size + shape.block_size) * C + L * 12 * C * C + vectors


def saved_by_blocks(
    shape: ModelShape, batch_size: int, itemsize: int, *, fused: bool, checkpointing: bool
) -> int:
    """Returns the bytes that blocks and norms save for the backward pass, without weights."""
    C, L, H = shape.n_embd, shape.n_layer, shape.n_head
    M = batch_size * shape.block_size
    statistics = 2 * 4 * M  # a norm's mean and 1 / standard deviation
    block = 16 * M * C * itemsize if fused else M * C * (15 * itemsize + 2 * 4)
    block += 4 * M * H + 2 * statistics
    first_norm = 2 * M * C * itemsize if fused else M * C * (itemsize + 4)
    if checkpointing:  # the stream and its norm as they enter each block
        return L * 2 * M * C * itemsize + (0 if fused else 4 * M * C) + statistics
    return L * block + first_norm + statistics


def estimate(
    shape: ModelShape,
    batch_size: int,
    dtype: torch.dtype,
    *,
    fused: bool = True,
    checkpointing: bool = False,
    muon: bool = False,
    room: int | None = None,
) -> Estimate:
    """Returns the memory of a step on micro-batches of batch_size x block_size tokens.

    muon  True if Muon optimizes the blocks' matrices
    room  bytes for the head's logits at a time; the default is that of a CPU
    """
    from fastgpt_kernels.linear_cross_entropy import CHUNK_BYTES, chunk_rows

    N, C, V, e = n_parameters(shape), shape.n_embd, shape.padded_vocab_size, dtype.itemsize
    M = batch_size * shape.block_size
    blocks = shape.n_layer * 12 * C * C
    # Eager keeps logits, log-probabilities in fp32, and the gradients of both.
    eager_loss = M * V * (e + 4 + 4 + e)
    loss = (
        M * C * e + 4 * V * C + chunk_rows(M, V, e, None, room or CHUNK_BYTES) * V * e
        if fused
        else eager_loss
    )
    one = dataclasses.replace(shape, n_layer=1)
    block = saved_by_blocks(one, batch_size, e, fused=fused, checkpointing=False)
    return Estimate(
        weights=4 * N,
        gradients=4 * N,
        optimizer=8 * N - (4 * blocks if muon else 0),
        casts=0 if dtype == torch.float32 else (blocks + V * C) * e,
        activations=saved_by_blocks(shape, batch_size, e, fused=fused, checkpointing=checkpointing),
        loss=loss,
        working=10 * M * C * e + (block if checkpointing else 0),
    )


def of_model(model: GPT, batch_size: int, optimizer: str = "adamw") -> Estimate:
    """Returns the estimate for a model with its kernels, dtype and checkpointing."""
    fused = any(c.implementation == "triton" for c in model.kernels.selected)
    from fastgpt_kernels.linear_cross_entropy import chunk_bytes

    return estimate(
        model.shape,
        batch_size,
        model.dtype,
        fused=fused,
        checkpointing=model.checkpointing,
        muon=optimizer == "muon",
        room=chunk_bytes(next(model.parameters()).device),
    )


def micro_batches(rows: int) -> Iterator[int]:
    """Yields the sizes that split a step's rows into equal micro-batches, largest first."""
    yield from (b for b in range(rows, 0, -1) if rows % b == 0)


def fit_batch_size(model: GPT, config: Config, machine: Machine) -> int:
    """Returns and prints the largest micro-batch that fits and splits a step's rows evenly.

    Candidates far above the estimate are skipped. The others run forward and backward, uncompiled,
    beside tensors as large as the optimizer's moments. On a CPU the config's size is returned.
    Raises UserError if not even one sequence fits.
    """
    o, device = config.optim, machine.device
    if device.type != "cuda":
        print(f"batch_size {o.batch_size}: as configured, for a search needs a GPU's memory")
        return o.batch_size
    free = _free(device)
    for size in micro_batches(o.rows):
        expected = of_model(model, size, o.optimizer)
        if expected.total - expected.weights <= 1.3 * free and _fits(model, machine, size):
            print(
                f"batch_size {size} x {o.rows // size} micro-batches: the largest that fits "
                f"{free / 2**30:.1f} GiB free"
            )
            return size
    raise UserError(
        f"--batch_size=auto: not one sequence of --block_size={config.model.block_size} fits the "
        f"{free / 2**30:.1f} GiB that are free; {_ways_out(config, 1)}"
    )


def _free(device: torch.device) -> int:
    """Returns the bytes free in the driver and in PyTorch's cache of this process."""
    driver, _ = torch.cuda.mem_get_info(device)
    return driver + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _fits(model: GPT, machine: Machine, batch_size: int) -> bool:
    size = (batch_size, model.shape.block_size + 1)
    tokens = torch.randint(model.shape.vocab_size, size, device=machine.device)
    moments: list[Tensor] = []
    try:
        moments += [torch.empty(2, *p.shape, device=p.device) for p in model.parameters()]
        for _ in range(2):  # the second one has gradients to add to
            model(tokens[:, :-1], tokens[:, 1:]).backward()
        machine.synchronize()
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        model.zero_grad(set_to_none=True)
        moments.clear()
        torch.cuda.empty_cache()


def _ways_out(config: Config, batch_size: int) -> str:
    ways = ["--batch_size=auto", "--activation_checkpointing=True", "a smaller --block_size"]
    if config.system.activation_checkpointing:
        ways.remove("--activation_checkpointing=True")
    if config.optim.auto_batch_size or batch_size == 1:
        ways.remove("--batch_size=auto")
    return "what helps: " + ", ".join(ways)


def out_of_memory(config: Config, model: GPT, device: torch.device, batch_size: int) -> str:
    """Returns a message: what was tried, its estimate, the free memory, and flags that help."""
    room, needed = "", of_model(model, batch_size, config.optim.optimizer).total
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        others = total - torch.cuda.mem_get_info(device)[0] - torch.cuda.memory_reserved(device)
        room = f", {(total - others) / 2**30:.1f} of {total / 2**30:.1f} GiB were free for it"
    return (
        f"out of memory at --batch_size={batch_size} x --block_size={config.model.block_size}: by "
        f"estimate it takes {needed / 2**30:.1f} GiB{room}; "
        f"{_ways_out(config, batch_size)}; the training stays the same at any --batch_size if "
        f"--gradient_accumulation_steps ({config.optim.rows // batch_size}) grows as it shrinks"
    )
