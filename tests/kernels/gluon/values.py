"""What an emulated Gluon kernel computes with: scalars, tensors in registers, pointers, tiles.

A tensor is a torch tensor without a layout. Sums of products are rounded once where the compiler
may contract them to one FMA: a float product keeps its factors until something but a sum uses it.
"""

from __future__ import annotations

import operator
import os
import sys
import threading
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

HERE = os.path.dirname(__file__)
FILES = "values.py", "machine.py", "emulator.py"
INTERNAL = {*(os.path.join(HERE, name) for name in FILES), threading.__file__}


class KernelError(Exception):
    """Fault of the kernel: a race, a deadlock, a misuse; the message names the lines."""


def where() -> str:
    """Returns the kernel's line that is running."""
    frame = sys._getframe(1)
    while frame.f_code.co_filename in INTERNAL and frame.f_back:
        frame = frame.f_back
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"


class Scalar(int):
    """An integer of the kernel, which unlike Python's has `to`."""

    def to(self, dtype: Any) -> Scalar:
        return self


def _integer(name: str) -> Any:
    def apply(self: Scalar, other: Any) -> Any:
        result = getattr(int, name)(self, other)
        return result if result is NotImplemented else Scalar(result)

    return apply


for _name in ("add", "sub", "mul", "floordiv", "mod", "and", "or", "xor", "lshift", "rshift"):
    setattr(Scalar, f"__{_name}__", _integer(f"__{_name}__"))
    setattr(Scalar, f"__r{_name}__", _integer(f"__r{_name}__"))


def raw(x: Any) -> Any:
    """Returns a value's torch tensor or number; a result that nobody waited for has none yet."""
    if hasattr(x, "unfinished"):
        raise KernelError(f"{where()}: result of the {x.unfinished} used before its wait")
    return x.t if isinstance(x, Tensor) else x


class Tensor:
    """A tensor in registers."""

    contract = True  # whether a sum with a product is rounded once

    def __init__(self, t: torch.Tensor, factors: tuple[Any, Any] | None = None):
        self.t, self.factors = t, factors

    @property
    def dtype(self) -> torch.dtype:
        return self.t.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.t.shape)

    def to(self, dtype: torch.dtype) -> Tensor:
        return Tensor(self.t.to(dtype))

    def _sum(self, other: Any, sign_self: int, sign_other: int) -> Any:
        if isinstance(other, Pointer):
            return other + self
        if not Tensor.contract or not (self.factors or getattr(other, "factors", None)):
            return Tensor(sign_self * self.t + sign_other * raw(other))
        a, b = _exact(self), _exact(other)
        return Tensor((sign_self * a + sign_other * b).float())

    def __add__(self, other: Any) -> Any:
        return self._sum(other, 1, 1)

    def __sub__(self, other: Any) -> Any:
        return self._sum(other, 1, -1)

    def __rsub__(self, other: Any) -> Any:
        return self._sum(other, -1, 1)

    def __rtruediv__(self, other: Any) -> Tensor:
        return Tensor(raw(other) / self.t)

    def __neg__(self) -> Tensor:
        return Tensor(-self.t)

    def __mul__(self, other: Any) -> Tensor:
        product = self.t * raw(other)
        return Tensor(product, (self.t, raw(other)) if product.dtype == torch.float32 else None)

    __radd__, __rmul__ = __add__, __mul__


def _exact(x: Any) -> Any:
    """Returns a value in fp64, a product before its rounding."""
    if isinstance(x, Tensor) and x.factors:
        return x.factors[0].double() * x.factors[1]
    return raw(x)


def _elementwise(apply: Any) -> Any:
    return lambda self, other: Tensor(apply(self.t, raw(other)))


for _name in ("truediv", "floordiv", "mod", "lt", "le", "gt", "ge", "eq", "ne", "and_", "or_"):
    _function = getattr(operator, _name)
    setattr(Tensor, f"__{_name.strip('_')}__", _elementwise(_function))


@dataclass
class Pointer:
    """An address in a global tensor, or a tensor of such; in elements."""

    data: torch.Tensor
    offset: Any = 0

    @property
    def dtype(self) -> Any:
        return SimpleNamespace(element_ty=self.data.dtype)

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.data, other + self.offset)

    __radd__ = __add__

    def locate(self, mask: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(the flat tensor, the offsets touched, which of the addresses they are) of an access."""
        offset = torch.as_tensor(raw(self.offset))
        kept = torch.ones_like(offset, dtype=torch.bool) if mask is None else raw(mask)
        kept = kept.expand(offset.shape)
        touched = offset[kept]
        if touched.numel() and not 0 <= touched.min() <= touched.max() < self.data.numel():
            raise KernelError(f"{where()}: global access out of bounds")
        return self.data.view(-1), touched, kept


class Tiles:
    """A TMA descriptor: blocks of a global tensor. Outside of it there are zeros."""

    def __init__(self, descriptor: Any):
        base = descriptor.base
        self.data = base.as_strided(descriptor.shape, descriptor.strides, base.storage_offset())
        self.block, self.layout, self.dtype = descriptor.block_shape, descriptor.layout, base.dtype
        self.writes = list[tuple[Any, Any, str]]()  # by TMA: (slices, operation, kind)
        self.bytes = torch.Size(self.block).numel() * base.element_size()
        if max(self.block) > 256:
            raise KernelError(f"a TMA box has at most 256 elements a side, not {self.block}")

    def window(self, coord: Any, shared: Any) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """Returns slices of the tensor and of the block at `coord`, of what lies inside both.

        The block may have dims of size one that the buffer in shared memory has not.
        """
        if len(coord) != self.data.dim() or any(c < 0 for c in coord):
            raise KernelError(f"{where()}: coordinates {coord} of a {self.data.dim()}-D descriptor")
        squeezed = [n for n in self.block if n > 1]
        if list(shared.shape) not in (list(self.block), squeezed) or shared.dtype != self.dtype:
            given = f"{shared.dtype} {list(shared.shape)}"
            raise KernelError(f"{where()}: blocks of {self.dtype} {self.block}, buffer of {given}")
        inside, part = [], []
        for c, b, n in zip(coord, self.block, self.data.shape, strict=True):
            end = max(c, min(c + b, n))
            inside.append(slice(c, end))
            part.append(slice(0, end - c))
        return tuple(inside), tuple(part)

    def view(self, t: torch.Tensor) -> torch.Tensor:
        """Returns shared memory with the dims of the block."""
        return t.view(self.block)
