"""Several processes on one model, as torchrun starts them: ranks, DDP, FSDP2, Muon's exchanges.

Every rank takes its rows of the same global batch. Decisions of the host, such as to stop, are the
same on all ranks. Without torchrun there is one rank and no process group. DDP keeps a whole model
on each GPU. FSDP2 keeps a shard of each tensor and gathers attention and MLP in the compute dtype
when their turn comes; embeddings and norms stay gathered in fp32. The parts of PyTorch that only
FSDP needs are imported where they are used, so that a run of one process does not load them.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

from fastgpt.config.schema import Config, OptimConfig, SystemConfig
from fastgpt.errors import RankError, SharedError, UserError
from fastgpt.model.device import DTYPES, Machine, resolve_device
from fastgpt.model.gpt import GPT
from fastgpt_kernels.progress import describe_error

T = TypeVar("T")


class Ranks:
    """Process `rank` of `size`. The default is a single process without a process group."""

    def __init__(self, rank: int = 0, size: int = 1, store: Any = None):
        self.rank, self.size, self.store = rank, size, store

    @property
    def first(self) -> bool:
        return self.rank == 0

    def rows(self, rows: int) -> slice:
        """Returns the slice of a step's rows that this rank takes."""
        each = rows // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    def micro_batch(self, rows: int, batch_size: int) -> int:
        """Returns the rows per micro-batch: batch_size, or its nearest divisor of a rank's rows."""
        each = rows // self.size
        return next(b for b in range(min(batch_size, each), 0, -1) if each % b == 0)

    def check(self, o: OptimConfig) -> None:
        """Raises UserError if the global batch does not divide among the ranks."""
        rows, steps = o.rows, o.gradient_accumulation_steps
        if rows % self.size:
            good = max(1, round(steps / self.size)) * self.size
            sizes = ", ".join(str(n) for n in range(1, min(rows, 64) + 1) if rows % n == 0)
            raise UserError(
                f"--batch_size={o.batch_size} x --gradient_accumulation_steps={steps} = {rows} "
                f"rows do not divide among {self.size} ranks; pass "
                f"--gradient_accumulation_steps={good}, or start one of {sizes} ranks"
            )

    def mean(self, value: Tensor) -> Tensor:
        """Averages `value` over the ranks in place, on the device."""
        return self.sum(value).div_(self.size)

    def sum(self, value: Tensor) -> Tensor:
        """Sums `value` over the ranks in place, on the device."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def largest(self, value: int) -> Callable[[], int]:
        """Starts an all-reduce of the maximum. Returns a function that waits for the result.

        It runs between hosts and does not wait for the GPUs.
        """
        if self.size == 1:
            return lambda: value
        box = torch.tensor(value)
        work = dist.all_reduce(box, dist.ReduceOp.MAX, async_op=True)

        def answer() -> int:
            work.wait()
            return int(box)

        return answer

    def gather(self, value: Any) -> list[Any]:
        """Returns the values of all ranks, by rank."""
        if self.size == 1:
            return [value]
        out: list[Any] = [None] * self.size
        dist.all_gather_object(out, value)
        return out

    @contextlib.contextmanager
    def raise_on_all_ranks(self) -> Iterator[None]:
        """Context that raises a UserError of one rank on all ranks, with the lowest rank's message.

        So all ranks finish it, or none, and one line is printed in total.
        """
        if self.size == 1:
            yield
            return
        error: UserError | None = None
        try:
            yield
        except UserError as e:
            error = e
        for rank, text in enumerate(self.gather(str(error) if error else None)):
            if text is not None:
                raise SharedError(f"rank {rank}: {text}" if rank else text) from error

    def from_first(self, function: Callable[[], T]) -> T:
        """Calls the function on rank 0 alone. Returns its result, or raises its error, on all."""
        result: Any = None
        with self.raise_on_all_ranks():
            if self.first:
                result = function()
        return self.gather(result)[0]

    def silent(self) -> list[int]:
        """Returns the ranks that do not answer within two seconds after a failed exchange."""
        with contextlib.suppress(Exception):
            self.store.set(f"alive/{self.rank}", "1")
            time.sleep(2.0)
            return [r for r in range(self.size) if not self.store.check([f"alive/{r}"])]
        return []


def _number(name: str, default: int, most: int = 10**9) -> int:
    """Returns a number that torchrun sets. Raises UserError if it is not one."""
    text = os.environ.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) <= most):
        raise UserError(f"{name}={text}: wanted a whole number, as torchrun sets it; or unset it")
    return int(text)


def local_device(name: str) -> str:
    """Returns the device of this process; under torchrun each process has its own GPU.

    Raises UserError if this machine does not have that GPU.
    """
    if resolve_device(name).type != "cuda" or "LOCAL_RANK" not in os.environ:
        return name
    local, count = _number("LOCAL_RANK", 0), torch.cuda.device_count()
    if local >= count:
        raise UserError(
            f"torchrun started process {local + 1} on a machine with {count} GPUs; pass "
            f"--nproc_per_node={count}"
        )
    torch.cuda.set_device(local)
    return f"cuda:{local}"


@contextlib.contextmanager
def join(config: Config, device: torch.device) -> Iterator[Ranks]:
    """Context with the process group of torchrun's ranks, or with a single rank.

    Only rank 0 writes to stdout. An error of another rank becomes a RankError that names it. A lost
    connection becomes a RankError that names the ranks that do not answer.
    """
    if unset := {"RANK", "MASTER_ADDR", "MASTER_PORT"} - {*os.environ}:
        if _number("WORLD_SIZE", 1) > 1:
            raise UserError(f"WORLD_SIZE is set, {min(unset)} is not: start with torchrun")
        yield Ranks()
        return
    _number("MASTER_PORT", 0, most=65535)
    # Gloo is for messages between hosts that must not wait for the GPUs.
    backend = f"cpu:gloo,cuda:{config.system.backend}" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=config.system.dist_timeout)
    ranks = Ranks(_number("RANK", 0), _number("WORLD_SIZE", 1))
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
        # The prefix keeps a restart from finding the addresses of processes that are gone.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"attempt-{attempt}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        ranks = Ranks(rank, size, store)
        with (
            open(os.devnull, "w") as null,
            contextlib.redirect_stdout(null if rank else sys.stdout),
        ):
            with ranks.raise_on_all_ranks():
                ranks.check(config.optim)
            yield ranks
        ranks.largest(0)()  # all leave at the same time, since rank 0 draws the loss curve
    except SharedError:
        raise
    except UserError as e:
        if ranks.first:
            raise
        raise RankError(f"rank {ranks.rank}: {e}") from e
    except RuntimeError as e:  # dist.DistError too
        if ranks.size == 1 or not _is_connection(e):
            raise
        silent = ", ".join(map(str, ranks.silent())) or "none of them silent"
        raise RankError(
            f"rank {ranks.rank}: lost the others (silent: rank {silent}; "
            f"--dist_timeout={config.system.dist_timeout:g}): {describe_error(e)}"
        ) from e
    finally:
        # After an error this would wait for a peer that may be gone.
        if dist.is_initialized() and sys.exc_info()[0] is None:
            dist.destroy_process_group()


def _is_connection(e: BaseException) -> bool:
    words = ("gloo", "timed out", "timeout", "connection", "peer", "nccl", "socket")
    return isinstance(e, dist.DistError) or any(w in str(e).lower() for w in words)


def shard(model: nn.Module, system: SystemConfig, machine: Machine) -> nn.Module:
    """Applies FSDP2 over all ranks: attention and MLP are a group each, the root has the rest."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if machine.dtype == "float16":
        raise UserError(
            "--parallel=fsdp: float16's loss scaling is not supported; pass --parallel=ddp or "
            "--dtype=bfloat16"
        )
    inner, outer = (
        MixedPrecisionPolicy(dtype, DTYPES[system.reduce_dtype], cast_forward_inputs=False)
        for dtype in (machine.torch_dtype, None)
    )
    mesh = dist.init_device_mesh(machine.device.type, (dist.get_world_size(),))
    for block in model.transformer.h:  # type: ignore[union-attr]
        for part in (block.attn, block.mlp):  # type: ignore[union-attr]
            if machine.compile:
                part.compile()  # between FSDP's hooks, which no graph can hold
            part.register_forward_hook(_copy_bias)  # before FSDP's hook, which comes next
            fully_shard(part, mesh=mesh, mp_policy=inner)
    fully_shard(model, mesh=mesh, mp_policy=outer, reshard_after_forward=False)
    return model


def _copy_bias(part: nn.Module, inputs: Any, output: tuple[Tensor, Tensor | None]) -> Any:
    """Copies the bias that a branch leaves to the norm: FSDP frees it when the branch returns."""
    y, bias = output
    return y, None if bias is None else bias.clone()


def replicate(model: nn.Module, system: SystemConfig, machine: Machine) -> DDP:
    """Wraps the model in DDP, which reduces buckets of gradients during the backward pass."""
    ids = [machine.device.index] if machine.device.type == "cuda" else None
    # The only buffers are copies of weights, equal on all ranks.
    ddp = DDP(model, device_ids=ids, gradient_as_bucket_view=True, broadcast_buffers=False)
    if system.reduce_dtype == "bfloat16":
        if ids is None:
            raise UserError(
                "--reduce_dtype=bfloat16: DDP reduces it on GPUs only; pass --reduce_dtype=float32 "
                "or --parallel=fsdp"
            )
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

        ddp.register_comm_hook(None, bf16_compress_hook)
    return ddp


# Bytes per parameter of fp32 weights, gradients and AdamW's moments, and the part of a GPU's memory
# above which they leave activations too little room.
STATE_BYTES, STATE_SHARE = 16, 0.6


def wrap(model: GPT, system: SystemConfig, machine: Machine) -> tuple[nn.Module, str]:
    """Returns the module to call instead of the model, and "ddp", "fsdp", or "" for one process.

    --parallel=auto is DDP if one GPU holds all training state.
    """
    if not dist.is_initialized():
        return model, ""
    kind = system.parallel
    if kind == "auto":
        kind = "ddp"
        if machine.device.type == "cuda":
            room = STATE_SHARE * torch.cuda.get_device_properties(machine.device).total_memory
            if STATE_BYTES * model.n_params(position_embeddings=True) > room:
                kind = "fsdp"
    return (replicate if kind == "ddp" else shard)(model, system, machine), kind


def reduce_gradients(wrapped: Any, now: bool) -> None:
    """Lets the next backward pass reduce gradients over the ranks, or only accumulate them."""
    if isinstance(wrapped, DDP):
        wrapped.require_backward_grad_sync = now  # all that its no_sync does
    elif hasattr(wrapped, "set_requires_gradient_sync"):  # an FSDPModule
        wrapped.set_requires_gradient_sync(now)
        wrapped.set_is_last_backward(now)


def local(t: Tensor) -> Tensor:
    """Returns this rank's shard of a DTensor, or any other tensor itself."""
    return t.to_local() if hasattr(t, "to_local") else t


def whole(t: Tensor) -> Tensor:
    """Returns the full tensor of a DTensor (all ranks take part), or any other tensor itself."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def whole_on_first(tensors: dict[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """Gathers full fp32 tensors one by one on rank 0's CPU. Returns {} on the other ranks."""
    full = ((k, whole(v)) for k, v in tensors.items())
    return {k: v.float().cpu() for k, v in full if ranks.first}


def write_shards(tensors: dict[str, Tensor], folder: Path) -> Path:
    """Writes one safetensors file of sharded tensors; no rank holds more than its shards.

    torch.distributed.checkpoint writes each rank's shards under `folder`, which all ranks share.
    Rank 0 then joins them through mapped files. Raises UserError on all ranks if one fails.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import HuggingFaceStorageWriter

    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True, enable_consolidation=True)
    try:
        dcp.save(tensors, storage_writer=writer)
    except dcp.api.CheckpointException as e:
        rank, (first, _) = min(e.failures.items())
        raise SharedError(f"{folder}: rank {rank} could not save: {first}") from e
    path = folder / "model-00001-of-00001.safetensors"
    if dist.get_rank() == 0:
        _write_scalars(path, {k: v for k, v in tensors.items() if v.ndim == 0})
    return path


def _write_scalars(path: Path, scalars: dict[str, Tensor]) -> None:
    """Writes the tensors without dimensions, in whose place torch 2.13 leaves zeros.

    Same bug as in https://github.com/NVIDIA-NeMo/Automodel/pull/301. A file has the header's length
    in 8 bytes, the header in JSON, the data: https://huggingface.co/docs/safetensors.
    """
    with open(path, "r+b") as f:
        length = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(length))
        for name, value in scalars.items():
            begin, end = header[name]["data_offsets"]
            f.seek(8 + length + begin)
            assert f.write(value.cpu().numpy().tobytes()) == end - begin


def like(t: Tensor, model_tensor: Tensor) -> Tensor:
    """Returns a full tensor in the layout of `model_tensor`, which may be sharded."""
    if not hasattr(model_tensor, "full_tensor") or t.shape != model_tensor.shape:
        return t
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = model_tensor.device_mesh, model_tensor.placements  # type: ignore[attr-defined]
    return distribute_tensor(t.to(model_tensor.device), mesh, placements, src_data_rank=None)


class MatrixScatter:
    """Matrices spread over the ranks for Muon, in a layout of `wrap`; in one process none moves.

    A stack (n, R, C) holds one kind of matrix of all blocks: with DDP all rows of each, with FSDP2
    this rank's rows, as torch.chunk cuts them. Where n does not divide among the ranks, some ranks
    work on zeros. Exchanges are launched like kernels, so no host waits.
    """

    def __init__(self, layout: str = ""):
        self.layout = layout

    def scatter(self, stack: Tensor, rows: int) -> Tensor:
        """Returns the whole matrices (each of `rows` rows) that this rank works on."""
        if self.layout == "ddp":
            return _padded(stack, 0)[dist.get_rank()].contiguous()
        if self.layout == "fsdp":
            most = -(-rows // dist.get_world_size())
            mine = _padded(F.pad(stack, (0, 0, 0, most - stack.shape[1])), 0)
            stack = _exchanged(mine).transpose(0, 1).flatten(1, 2)[:, :rows]
        return stack

    def gather(self, mine: Tensor, stack: Tensor) -> Tensor:
        """Returns the results of all ranks in the layout of `stack`."""
        if self.layout == "ddp":
            every = mine.new_empty(dist.get_world_size() * len(mine), *mine.shape[1:])
            dist.all_gather_into_tensor(every, mine)
            return every[: len(stack)]
        if self.layout == "fsdp":
            parts = _exchanged(_padded(mine, 1).transpose(0, 1))
            return parts.flatten(0, 1)[: len(stack), : stack.shape[1]]
        return mine


def _padded(x: Tensor, dim: int) -> Tensor:
    """Pads a dimension with zeros to a multiple of the ranks and splits it into (ranks, each)."""
    ranks = dist.get_world_size()
    missing = -x.shape[dim] % ranks
    return F.pad(x, (0, 0) * (x.ndim - 1 - dim) + (0, missing)).unflatten(dim, (ranks, -1))


def _exchanged(parts: Tensor) -> Tensor:
    """Sends parts[r] to rank r and returns the parts received, by rank."""
    parts = parts.contiguous()
    out = parts.new_empty(parts.shape)
    dist.all_to_all_single(out, parts)
    return out
