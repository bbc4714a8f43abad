"""Memory of a training step by estimate, and the fastest micro-batch that fits.

For M tokens per micro-batch, width C, padded vocabulary V and e bytes per activation, the fused ops
save for the backward pass

    per block   16 M C e    norm 1, qkv 3, attention 1, stream 1, norm 1, MLP 4 + 4, stream 1
    loss        M C e       its gradient; and 4 V C bytes for the head's gradient

and in fp32 the log-sum-exp of attention's rows and two statistics per norm. The eager ops also save
the norm's input in fp32, a copy of attention's output, and all logits.
"""

from __future__ import annotations

import math
import statistics
import time

import torch
from torch import Tensor

from fastgpt.config.schema import Config
from fastgpt.errors import UserError
from fastgpt.model.device import Machine
from fastgpt.model.gpt import GPT
from fastgpt.train.distributed import Ranks


def estimate(model: GPT, batch_size: int, optimizer: str = "adamw") -> dict[str, int]:
    """Returns the bytes at the peak of a step, which is the end of the forward pass, by their use.

    It depends on the model's sizes, dtype, kernels and checkpointing, on micro-batches of
    batch_size x block_size tokens, and on the optimizer, adamw or muon.
    """
    from fastgpt_kernels.linear_cross_entropy import chunk_bytes, chunk_rows

    shape, e = model.shape, model.dtype.itemsize
    fused = any(s.implementation == "triton" for s in model.kernels.selected)
    N, L, C = model.n_params(position_embeddings=True), shape.n_layer, shape.n_embd
    M, V = batch_size * shape.block_size, shape.padded_vocab_size
    matrices = L * 12 * C * C

    stream, statistics = M * C * e, 2 * 4 * M  # of a norm: mean and 1 / standard deviation
    norm_input = stream if fused else 4 * M * C
    norm = stream + norm_input + statistics  # its output too
    block = 2 * norm + (12 if fused else 13) * stream + 4 * M * shape.n_head
    activations = L * block + norm
    if model.checkpointing:  # the stream and its norm as they enter each block
        activations = L * 2 * stream + (0 if fused else norm_input) + statistics

    if fused:
        most_bytes = chunk_bytes(next(model.parameters()).device)
        loss = stream + 4 * V * C + chunk_rows(M, V, e, None, most_bytes) * V * e
    else:  # logits, log-probabilities in fp32, and the gradients of both
        loss = M * V * (e + 4 + 4 + e)
    return {
        "weights": 4 * N,
        "gradients": 4 * N,  # allocated by an earlier micro-batch
        "optimizer": 8 * N - (4 * matrices if optimizer == "muon" else 0),  # fp32 moments
        "casts": 0 if e == 4 else (matrices + V * C) * e,
        "activations": activations,
        "loss": loss,
        # Gradients inside one block, and with checkpointing the block's activations.
        "working": 10 * stream + (block + norm if model.checkpointing else 0),
    }


def describe(expected: dict[str, int]) -> str:
    """Returns an estimate in one line."""
    parts = ", ".join(f"{k} {v / 2**30:.2f}" for k, v in expected.items())
    return f"{sum(expected.values()) / 2**30:.2f} GiB ({parts})"


CANDIDATES, ROUNDS = 4, 3
LIMIT_S = 30.0  # after which no other round begins
MARGIN = 0.01  # of the highest speed, within which the largest size is taken


def fastest_batch_size(model: GPT, config: Config, machine: Machine, ranks: Ranks) -> int:
    """Returns the fastest micro-batch of those that fit and split a rank's rows evenly.

    The largest that fits is timed against smaller ones, each at most 2/3 of the one before, in
    turns, uncompiled, beside tensors as large as the optimizer's moments. The slowest rank counts.
    On other devices than GPUs the config's size is the largest. Prints a line per size. Raises
    UserError if not even one sequence fits.
    """
    rows, block_size = config.optim.rows // ranks.size, config.model.block_size
    on_gpu, free = machine.device.type == "cuda", _free(machine.device)

    def seconds(size: int, steps: int) -> float:
        expected = estimate(model, size, config.optim.optimizer)
        far_above = sum(expected.values()) - expected["weights"] > 1.3 * free
        return max(ranks.gather(math.inf if far_above else _seconds(model, machine, size, steps)))

    most = rows if on_gpu else min(rows, config.optim.batch_size)
    sizes = [size for size in range(most, 0, -1) if rows % size == 0]
    fitting = next((i for i, size in enumerate(sizes) if seconds(size, 1) < math.inf), None)
    if fitting is None:
        raise UserError(
            f"--batch_size=auto: not one sequence of --block_size={block_size} fits the "
            f"{free / 2**30:.1f} GiB that are free; {_ways_out(config, 1)}"
        )
    times: dict[int, list[float]] = {sizes[fitting]: []}  # seconds per row
    for size in sizes:
        if 3 * size <= 2 * min(times) and len(times) < CANDIDATES:
            times[size] = []
    spent = 0.0
    for i in range(ROUNDS):
        for size in [*times] if i % 2 else [*times][::-1]:
            steps = max(times) // size
            took = seconds(size, steps)
            times[size].append(took / (steps * size))
            spent += took
        if spent > LIMIT_S:
            break
    speed = {size: ranks.size * block_size / statistics.median(t) for size, t in times.items()}
    best = next(size for size in speed if speed[size] >= (1 - MARGIN) * max(speed.values()))
    for size in speed:
        chosen = ", chosen" if size == best else ""
        print(f"batch_size {size} x {rows // size}: {speed[size]:,.0f} tokens/s{chosen}")
    return best


def _free(device: torch.device) -> float:
    """Returns the bytes free in the driver and in PyTorch's cache; infinity without a GPU."""
    if device.type != "cuda":
        return math.inf
    driver, _ = torch.cuda.mem_get_info(device)
    return driver + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _seconds(model: GPT, machine: Machine, batch_size: int, steps: int) -> float:
    """Returns the time of micro-steps after one that is not timed; infinity if they do not fit.

    Weights, gradients and generators are afterwards as before.
    """
    device, size = machine.device, (batch_size, model.shape.block_size + 1)
    moments, began = list[Tensor](), 0.0
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            tokens = torch.randint(model.shape.vocab_size, size, device=device)
            moments += [torch.empty(2, *p.shape, device=p.device) for p in model.parameters()]
            for step in range(1 + steps):  # from the second on there are gradients to add to
                if step == 1:
                    machine.synchronize()
                    began = time.perf_counter()
                model(tokens[:, :-1], tokens[:, 1:]).backward()
            machine.synchronize()
            return time.perf_counter() - began
        except torch.OutOfMemoryError:
            return math.inf
        finally:
            model.zero_grad(set_to_none=True)
            moments.clear()
            if device.type == "cuda":
                torch.cuda.empty_cache()


def _ways_out(config: Config, batch_size: int) -> str:
    ways = {
        "--batch_size=auto": batch_size > 1 and not config.optim.auto_batch_size,
        "--activation_checkpointing=True": not config.system.activation_checkpointing,
        "a smaller --block_size": True,
    }
    return "what helps: " + ", ".join(way for way, helps in ways.items() if helps)


def out_of_memory(config: Config, model: GPT, device: torch.device, batch_size: int) -> str:
    """Returns a message: what was tried, its estimate, the free memory, and flags that help."""
    room, needed = "", sum(estimate(model, batch_size, config.optim.optimizer).values())
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
