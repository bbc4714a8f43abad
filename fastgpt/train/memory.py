"""Memory of a training step: what it will need, counted; and the largest micro-batch that fits.

With M = batch_size * block_size tokens in a micro-batch, width C, L layers, vocabulary V (padded),
N parameters and e bytes an activation, the fused ops keep for the backward pass

    a block     16 M C e    norm 1, qkv 3, attention 1, stream 1, norm 1, MLP 4 + 4, stream 1
    loss        M C e       its gradient, which the loss op has already; and 4 V C for the head's

and the log-sum-exp of each head's rows and two statistics of each norm's, in fp32. Nothing grows
with T squared, and logits are there for one chunk of rows at a time. The eager ops keep more: the
norm's input in fp32, a copy of attention's output, and all logits, once in fp32.

`tests/train/test_memory.py` holds these formulas against what autograd saves, and on a GPU the
total against the peak that the allocator saw.
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
from fastgpt_kernels.registry import spec


@dataclass(frozen=True)
class Estimate:
    """Bytes at the peak of a step: at the end of the forward pass, with gradients there already."""

    weights: int
    """fp32 masters."""
    gradients: int
    """fp32."""
    optimizer: int
    """AdamW's two moments, fp32; of Muon's matrices one."""
    casts: int
    """Weights in the activations' dtype: copies, or rounded in the forward pass."""
    activations: int
    """What the blocks keep for the backward pass."""
    loss: int
    """The head's gradients and logits."""
    working: int
    """Gradients of one block's activations on their way, or with checkpointing the block again."""

    @property
    def total(self) -> int:
        return sum(vars(self).values())

    def __str__(self) -> str:
        parts = ", ".join(f"{k} {v / 2**30:.2f}" for k, v in vars(self).items())
        return f"{self.total / 2**30:.2f} GiB ({parts})"


def n_parameters(shape: ModelShape) -> int:
    """Parameters of a model of this shape, position embeddings and padding included."""
    C, L = shape.n_embd, shape.n_layer
    vectors = (2 * L + 1) * C + (shape.bias and (2 * L + 1) * C + L * 9 * C)
    return (shape.padded_vocab_size + shape.block_size) * C + L * 12 * C * C + vectors


def saved_by_blocks(
    shape: ModelShape, batch_size: int, itemsize: int, *, fused: bool, checkpointing: bool
) -> int:
    """Bytes that blocks and norms keep for the backward pass, besides weights."""
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
    """Memory of a training step on micro-batches of batch_size x block_size tokens.

    muon  whether it is the optimizer of the blocks' matrices
    room  bytes that the head's logits may take at a time; default: as on a CPU
    """
    from fastgpt_kernels.ops.loss.linear import CHUNK_BYTES, chunk_rows

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
    """The estimate for a model as it stands: its ops, its dtype, checkpointed or not."""
    fused = any(c.implementation == "triton" for c in model.ops.choices if not spec(c.op).library)
    from fastgpt_kernels.ops.loss.linear import room_on

    return estimate(
        model.shape,
        batch_size,
        model.dtype,
        fused=fused,
        checkpointing=model.checkpointing,
        muon=optimizer == "muon",
        room=room_on(next(model.parameters()).device),
    )


def micro_batches(rows: int) -> Iterator[int]:
    """Sizes that cut a step's rows into equal micro-batches, largest first."""
    yield from (b for b in range(rows, 0, -1) if rows % b == 0)


def fit_batch_size(model: GPT, config: Config, machine: Machine) -> int:
    """The largest micro-batch that fits and cuts the rows of a step evenly; says which it is.

    Candidates that the estimate rules out by far are passed over, the others are tried: forward and
    backward, uncompiled, with room taken for the optimizer's moments. Raises UserError if not even
    one sequence fits. On a CPU, which gains nothing from larger ones, returns the config's.
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
    """Bytes that an allocation could still get: the driver's, and the cache's of this process."""
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
    """What was tried, what it needs by the estimate, what was free, and which flags help."""
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
