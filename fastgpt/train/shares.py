"""Work on whole matrices, shared out among the ranks: each gets some, and what it makes of them
goes back to all.

A stack (n, R, C) holds one kind of matrix of all blocks; of those that do not divide among the
ranks, some ranks get zeros to work on. Exchanges are launched like kernels: no host waits.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F


class Shares:
    """One process, which does it all."""

    def take(self, stack: Tensor, rows: int) -> Tensor:
        """What this rank has of a stack of matrices of `rows` rows -> its share of whole ones."""
        return stack

    def give(self, share: Tensor, stack: Tensor) -> Tensor:
        """The share worked on -> the stack worked on, in the layout of `stack`."""
        return share


class Replicated(Shares):
    """All ranks have the same whole matrices (DDP): a part is taken, and gathered again."""

    def take(self, stack: Tensor, rows: int) -> Tensor:
        return _padded(stack, 0)[dist.get_rank()].contiguous()

    def give(self, share: Tensor, stack: Tensor) -> Tensor:
        every = share.new_empty(dist.get_world_size() * len(share), *share.shape[1:])
        dist.all_gather_into_tensor(every, share)
        return every[: len(stack)]


class Sharded(Shares):
    """Each rank has rows of every matrix (FSDP2), as torch.chunk cuts them.

    All send their rows to those who work on the matrix, and get them back.
    """

    def take(self, stack: Tensor, rows: int) -> Tensor:
        most = -(-rows // dist.get_world_size())
        mine = _padded(F.pad(stack, (0, 0, 0, most - stack.shape[1])), 0)  # (ranks, each, most, C)
        parts = _exchanged(mine)
        return parts.transpose(0, 1).flatten(1, 2)[:, :rows]

    def give(self, share: Tensor, stack: Tensor) -> Tensor:
        parts = _padded(share, 1).transpose(0, 1)
        return _exchanged(parts).flatten(0, 1)[: len(stack), : stack.shape[1]]


def shares_of(layout: str) -> Shares:
    """What goes with a layout of `sharding.wrap`."""
    return {"ddp": Replicated, "fsdp": Sharded}.get(layout, Shares)()


def _padded(x: Tensor, dim: int) -> Tensor:
    """Zeros after the end of a dimension until it divides among the ranks; (ranks, each) of it."""
    ranks = dist.get_world_size()
    missing = -x.shape[dim] % ranks
    return F.pad(x, (0, 0) * (x.ndim - 1 - dim) + (0, missing)).unflatten(dim, (ranks, -1))


def _exchanged(parts: Tensor) -> Tensor:
    """parts[r] goes to rank r; what came from rank r, in its place."""
    parts = parts.contiguous()
    out = parts.new_empty(parts.shape)
    dist.all_to_all_single(out, parts)
    return out
