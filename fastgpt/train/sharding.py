"""The model over the ranks: PyTorch's DDP or FSDP2, and tensors that are shared out.

DDP keeps a whole model on each GPU. FSDP2 keeps a share of each tensor: attention and MLP are
gathered in the compute dtype when their turn comes; embeddings, which the head needs again, and
norms, which the block before reads, form a group of their own that stays gathered, in fp32.

The parts of PyTorch that FSDP alone needs are imported by the functions that use them, so that a
run of one process does not wait for them.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

from fastgpt.config.schema import SystemConfig
from fastgpt.errors import SharedError, UserError
from fastgpt.model.device import DTYPES, Machine
from fastgpt.train.ranks import Ranks

# fp32 weights, gradients and AdamW's moments; more than this share of a GPU leaves activations
# too little room.
STATE_BYTES, STATE_SHARE = 16, 0.6


def strategy(parallel: str, n_params: int, device: torch.device) -> str:
    """ddp or fsdp for --parallel; auto is DDP if a GPU holds all of the training state."""
    if parallel != "auto":
        return parallel
    if device.type != "cuda":
        return "ddp"
    room = torch.cuda.get_device_properties(device).total_memory
    return "fsdp" if STATE_BYTES * n_params > STATE_SHARE * room else "ddp"


def shard(model: nn.Module, system: SystemConfig, machine: Machine) -> None:
    """FSDP2 over all ranks: attention and MLP each a group, the rest the root's."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if machine.dtype == "float16":
        raise UserError(
            "--parallel=fsdp: float16's loss scaling is not supported; pass --parallel=ddp or "
            "--dtype=bfloat16"
        )
    reduce = DTYPES[system.reduce_dtype]
    inner = MixedPrecisionPolicy(machine.torch_dtype, reduce, cast_forward_inputs=False)
    outer = MixedPrecisionPolicy(None, reduce, cast_forward_inputs=False)
    mesh = dist.init_device_mesh(machine.device.type, (dist.get_world_size(),))
    for block in model.transformer.h:  # type: ignore[union-attr]
        for part in (block.attn, block.mlp):  # type: ignore[union-attr]
            if machine.compile:
                part.compile()  # between FSDP's hooks, which no graph can hold
            fully_shard(part, mesh=mesh, mp_policy=inner)
    fully_shard(model, mesh=mesh, mp_policy=outer, reshard_after_forward=False)


def replicate(model: nn.Module, system: SystemConfig, machine: Machine) -> DDP:
    """DDP: buckets of gradients are reduced while the backward pass goes on."""
    ids = [machine.device.index] if machine.device.type == "cuda" else None
    # The only buffers are copies of weights, which are the same on all ranks.
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


def wrap(model: nn.Module, system: SystemConfig, machine: Machine) -> tuple[nn.Module, str]:
    """(what to call in the model's place, "ddp", "fsdp", or "" without torchrun)."""
    if not dist.is_initialized():
        return model, ""
    n_params = sum(p.numel() for p in model.parameters())
    kind = strategy(system.parallel, n_params, machine.device)
    if kind == "ddp":
        return replicate(model, system, machine), kind
    shard(model, system, machine)
    return model, kind


@contextlib.contextmanager
def _fsdp_sync(model: Any, last: bool) -> Iterator[None]:
    model.set_requires_gradient_sync(last)
    model.set_is_last_backward(last)
    yield


def reducing(wrapped: nn.Module, last: bool) -> AbstractContextManager:
    """Around a micro-step: gradients are reduced in the `last` one and only added up before."""
    if isinstance(wrapped, DDP):
        return contextlib.nullcontext() if last else wrapped.no_sync()
    if hasattr(wrapped, "set_requires_gradient_sync"):  # an FSDPModule
        return _fsdp_sync(wrapped, last)
    return contextlib.nullcontext()


def local(t: Tensor) -> Tensor:
    """This rank's part of a DTensor; any other tensor as it is."""
    return t.to_local() if hasattr(t, "to_local") else t


def whole(t: Tensor) -> Tensor:
    """The full tensor of one that may be sharded; all ranks take part."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def whole_on_first(tensors: dict[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """Full fp32 tensors on the CPU of rank 0, gathered one by one; nothing on the others."""
    full = ((k, whole(v)) for k, v in tensors.items())
    return {k: v.float().cpu() for k, v in full if ranks.first}


def write_shards(tensors: dict[str, Tensor], folder: Path) -> Path:
    """One safetensors file of tensors that are shared out; no rank holds more than its part.

    torch.distributed.checkpoint writes each rank's part under `folder`, which all ranks see, and
    rank 0 joins them through mapped files. All ranks take part. Raises UserError on all of them
    if one could not write.
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
    """Fill in tensors without dimensions: joining the parts leaves zeros in their place.

    Seen with torch 2.13, as in https://github.com/NVIDIA-NeMo/Automodel/pull/301. A file has the
    header's length in 8 bytes, the header in JSON, the data: https://huggingface.co/docs/safetensors.
    """
    with open(path, "r+b") as f:
        length = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(length))
        for name, value in scalars.items():
            begin, end = header[name]["data_offsets"]
            f.seek(8 + length + begin)
            assert f.write(value.cpu().numpy().tobytes()) == end - begin


def like(t: Tensor, model_tensor: Tensor) -> Tensor:
    """A full tensor laid out as `model_tensor` is: if that is shared out, this rank's share."""
    if not hasattr(model_tensor, "full_tensor") or t.shape != model_tensor.shape:
        return t
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = model_tensor.device_mesh, model_tensor.placements  # type: ignore[attr-defined]
    return distribute_tensor(t.to(model_tensor.device), mesh, placements, src_data_rank=None)
