"""A cuBLASLt without a GPU: it records its calls, and multiplies in PyTorch at the addresses given.

Descriptors are dictionaries of the attributes that were set. Addresses have to be as aligned as the
descriptors say, since the heuristics chose an algorithm for that.
"""

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastgpt_kernels import mlp_cublaslt as lt
from fastgpt_kernels import reference

HANDLE, STREAM, WORKSPACE = 5, 9, 1 << 10
OF_NUMBER = {number: dtype for dtype, number in lt.DTYPES.items()}


class FakeLibrary:
    """The functions of cuBLASLt that mlp_cublaslt.py calls.

    status  what a function returns instead of doing something, by its name
    found   how many algorithms the heuristics find
    """

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.status: dict[str, int] = {}
        self.found = 1
        self.objects: list[Any] = [None]

    def __getattr__(self, name: str) -> Callable[..., int]:
        action = next(
            f
            for end, f in {
                "Create": self.create, "SetAttribute": self.set,
                "MatmulAlgoGetHeuristic": self.heuristic, "Matmul": self.matmul,
            }.items()
            if name.endswith(end)
        )  # fmt: skip

        def function(*arguments: Any) -> int:
            self.calls.append(name)
            if name not in self.status:
                action(*arguments)
            return self.status.get(name, 0)

        return function

    def cublasLtGetStatusName(self, status: int) -> bytes:
        return f"CUBLAS_STATUS_{status}".encode()

    def create(self, handle: Any, *arguments: Any) -> None:
        handle._obj.value = len(self.objects)
        self.objects.append([x.value for x in arguments] if len(arguments) == 4 else {})

    def set(self, handle: Any, attribute: Any, value: Any, size: Any) -> None:
        assert size.value == ctypes.sizeof(value._obj)
        self.objects[handle.value][attribute.value] = value._obj.value

    def heuristic(
        self, handle: Any, description: Any, a: Any, b: Any, c: Any, d: Any, preference: Any,
        wanted: Any, found: Any, count: Any,
    ) -> None:  # fmt: skip
        assert (handle.value, wanted.value, c) == (HANDLE, 1, d)
        limits = self.objects[preference.value]
        assert limits[1] >= WORKSPACE and limits[3] == 2, "sums are added in fp32"
        alignments = {limits[n] for n in (5, 6, 7, 8)}
        alignments.add(self.objects[description.value][lt.AUX])
        (self.alignment,) = alignments
        found._obj.workspace_bytes, found._obj.algorithm[0] = WORKSPACE, self.alignment
        count._obj.value = self.found

    def matmul(
        self, handle: Any, description: Any, one: Any, a_at: Any, a: Any, b_at: Any, b: Any,
        zero: Any, c_at: Any, c: Any, d_at: Any, d: Any, found: Any, workspace_at: Any,
        workspace: Any, stream: Any,
    ) -> None:  # fmt: skip
        told = self.objects[description.value]
        assert (handle.value, stream.value, workspace.value) == (HANDLE, STREAM, WORKSPACE)
        assert (one._obj.value, zero._obj.value, c_at) == (1, 0, d_at) and workspace_at.value
        pointers = [x.value for x in (a_at, b_at, d_at)] + [told[lt.AUX], told[lt.BIAS]]
        assert not any(x % found._obj.algorithm[0] for x in pointers)
        N, dtype = self.objects[d.value][1], self.objects[d.value][0]
        assert told[lt.AUX_LD] >= N and told[lt.AUX_LD] % 8 == 0
        left, right = self.matrix(a_at.value, a), self.matrix(b_at.value, b)
        left, right = (x.t() if told[n] else x for x, n in ((left, lt.TRANSA), (right, lt.TRANSB)))
        product, out = left.float() @ right.float(), self.matrix(d_at.value, d)
        aux = memory(told[lt.AUX], dtype, out.shape[1], told[lt.AUX_LD])[:, :N].t()
        bias: Any = memory(told[lt.BIAS], dtype, N) if told[lt.BIAS] else None
        match told[lt.EPILOGUE]:
            case 164 | 160:  # GELU_AUX_BIAS, GELU_AUX
                z = product if told[lt.EPILOGUE] == 160 else product + bias.float()[:, None]
                aux.copy_(z)
                out.copy_(reference.bias_gelu(z))
            case 208 | 192:  # DGELU_BGRAD, DGELU
                dz = torch.ops.aten.gelu_backward(product, aux.float(), approximate="tanh")
                out.copy_(dz)
                if told[lt.EPILOGUE] == 208:
                    bias.copy_(dz.sum(1))

    def matrix(self, at: int, layout: Any) -> Tensor:
        """Returns the matrix (rows, columns) that lies column by column at an address."""
        dtype, rows, columns, ld = self.objects[layout.value]
        return memory(at, dtype, columns, ld)[:, :rows].t()


def memory(at: int, dtype: int, *shape: int) -> Tensor:
    found = (ctypes.c_char * (2 * torch.Size(shape).numel())).from_address(at)
    return torch.frombuffer(found, dtype=OF_NUMBER[dtype]).view(shape)
