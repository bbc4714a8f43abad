"""The MLP's two matmuls next to GELU by cuBLASLt, with GELU in its own epilogues.

    forward    z = x W1^T + b1,  h = gelu(z)          x (M, K), W1 (N, K), b1 (N,); z, h (M, N)
    backward   dz = (dy W2) * gelu'(z)                dy (M, K), W2 (K, N), z (M, N); dz (M, N)
               db1 = the sum of dz's rows

GELU_AUX_BIAS writes z and h from one fp32 sum; DGELU_BGRAD reads z, which has the bias in it. The
form of GELU is tanh's (pytorch/pytorch#104061). The library is PyTorch's own, called by ctypes.
Not measured. Source: cuBLAS Library, "cublasLtEpilogue_t" and "cublasLtMatmulDescAttributes_t".
"""

from __future__ import annotations

import ctypes
import functools
import threading
from ctypes import byref, c_float, c_int, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from typing import Any

import torch
from torch import Tensor

from fastgpt_kernels.launch import on_device

WORKSPACE_BYTES = 32 << 20  # at most; as much as NVIDIA recommends for sm_90
ROW_BYTES = 16  # tensors and their rows begin at multiples of this
MOST_ALIGNED = 256  # bytes; above these the heuristics tell nothing apart

DTYPES = {torch.float16: 2, torch.bfloat16: 14}  # cudaDataType_t
FP32, COMPUTE_FP32 = 0, 68  # cudaDataType_t, cublasComputeType_t
TRANSA, TRANSB, EPILOGUE, BIAS, AUX, AUX_LD = 3, 4, 7, 8, 11, 12  # cublasLtMatmulDescAttributes_t
# cublasLtMatmulPreferenceAttributes_t; parts of a sum along K are added in fp32, or there are none.
MAX_WORKSPACE, REDUCTIONS, MIN_ALIGNMENTS, IN_FP32 = 1, 3, (5, 6, 7, 8), 2
GELU_AUX, ADD_BIAS, DGELU, BIAS_GRADIENT = 32 | 128, 4, 64 | 128, 16  # cublasLtEpilogue_t

# --- The library ------------------------------------------------------------------------------


class Algorithm(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t: an algorithm and what it needs."""

    _fields_ = (
        ("algorithm", c_uint64 * 8),
        ("workspace_bytes", c_size_t),
        ("status", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    )


@functools.cache
def library() -> Any:
    """Returns the cuBLASLt that PyTorch has loaded. Raises OSError without one."""
    if torch.version.cuda is None:
        raise OSError("this PyTorch was built without CUDA")
    found = ctypes.CDLL(f"libcublasLt.so.{torch.version.cuda.partition('.')[0]}")
    found.cublasLtGetStatusName.restype = ctypes.c_char_p
    return found


def unsupported_reason(arch: str) -> str | None:
    """Returns why cuBLASLt does not run on an architecture, or None if it does."""
    if not arch.startswith("sm_"):
        return f"cublaslt is for NVIDIA GPUs, not {arch}"
    try:
        library()
    except OSError as e:
        return f"cublaslt: {e}"
    return None


def _call(name: str, *arguments: Any) -> None:
    """Calls a function of the library. Raises RuntimeError if it reports an error."""
    if status := getattr(library(), name)(*arguments):
        said = library().cublasLtGetStatusName(status).decode()
        raise RuntimeError(f"cublaslt: {name} returned {said}")


def _created(kind: str, *arguments: Any) -> c_void_p:
    handle = c_void_p()
    _call(f"cublasLt{kind}Create", byref(handle), *arguments)
    return handle


def _set(kind: str, handle: c_void_p, values: dict[int, Any]) -> None:
    for attribute, value in values.items():
        size = c_size_t(ctypes.sizeof(value))
        _call(f"cublasLt{kind}SetAttribute", handle, c_int(attribute), byref(value), size)


# --- One matmul -------------------------------------------------------------------------------


class _Matmul:
    """The descriptors of one shape, and the algorithm that the heuristics name first.

    cuBLAS stores matrices by columns, so it computes out^T (N, M) = op(weight) x^T. The weight is
    (N, K) forward and (K, N) backward. `alignment` is that of all pointers, in bytes.
    """

    def __init__(
        self, backward: bool, M: int, N: int, K: int, dtype: torch.dtype, bias: bool, alignment: int
    ):
        def layout(rows: int, columns: int) -> c_void_p:
            sizes = c_uint64(rows), c_uint64(columns), c_int64(rows)
            return _created("MatrixLayout", c_int(DTYPES[dtype]), *sizes)

        self.lock = threading.Lock()  # a call's pointers are attributes of the description
        self.description = _created("MatmulDesc", c_int(COMPUTE_FP32), c_int(FP32))
        self.weight = layout(N, K) if backward else layout(K, N)
        self.x, self.out = layout(K, M), layout(N, M)
        epilogue = DGELU | bias * BIAS_GRADIENT if backward else GELU_AUX | bias * ADD_BIAS
        attributes = {
            TRANSA: c_int(not backward), TRANSB: c_int(False), EPILOGUE: c_uint32(epilogue),
            # The heuristics read the alignment off these addresses.
            AUX: c_uint64(alignment), AUX_LD: c_int64(N), BIAS: c_uint64(bias * alignment),
        }  # fmt: skip
        _set("MatmulDesc", self.description, attributes)
        limits: dict[int, Any] = {matrix: c_uint32(alignment) for matrix in MIN_ALIGNMENTS}
        limits |= {MAX_WORKSPACE: c_uint64(WORKSPACE_BYTES), REDUCTIONS: c_uint32(IN_FP32)}
        _set("MatmulPreference", preference := _created("MatmulPreference"), limits)
        self.found, count = Algorithm(), c_int()
        layouts = self.weight, self.x, self.out, self.out
        _call(
            "cublasLtMatmulAlgoGetHeuristic", c_void_p(torch.cuda.current_blas_handle()),
            self.description, *layouts, preference, c_int(1), byref(self.found), byref(count),
        )  # fmt: skip
        if count.value == 0 or self.found.status:
            raise RuntimeError(f"cublaslt: no algorithm for M={M}, N={N}, K={K} in {dtype}")

    def launch(
        self, x: Tensor, weight: Tensor, z: Tensor, out: Tensor, bias: Tensor | None
    ) -> None:
        """Launches the matmul on the current stream; z is AUX, and bias is b1 or db1."""
        size = self.found.workspace_bytes
        workspace = torch.empty(size, dtype=torch.uint8, device=x.device)
        at = [c_void_p(t.data_ptr()) for t in (weight, x, out, workspace)]
        bias_at = 0 if bias is None else bias.data_ptr()
        with self.lock:
            pointers = {AUX: c_uint64(z.data_ptr()), BIAS: c_uint64(bias_at)}
            _set("MatmulDesc", self.description, pointers)
            _call(
                "cublasLtMatmul", c_void_p(torch.cuda.current_blas_handle()), self.description,
                byref(c_float(1.0)), at[0], self.weight, at[1], self.x,
                byref(c_float(0.0)), at[2], self.out, at[2], self.out,
                byref(self.found), at[3], c_size_t(size),
                c_void_p(torch.cuda.current_stream().cuda_stream),
            )  # fmt: skip


@functools.cache
def _matmul(device_index: int | None, *shape: Any) -> _Matmul:
    return _Matmul(*shape)


# --- Launchers --------------------------------------------------------------------------------


def _aligned(x: Tensor) -> Tensor:
    """Returns x, or a dense copy where rows or their addresses are not as cuBLASLt needs them."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % ROW_BYTES else x


def _launch(
    backward: bool, x: Tensor, weight: Tensor, z: Tensor, out: Tensor, bias: Tensor | None
) -> None:
    addresses = MOST_ALIGNED
    for t in (x, weight, z, out, *(() if bias is None else (bias,))):
        addresses |= t.data_ptr()
    shape = out.shape[0], out.shape[1], x.shape[1], x.dtype, bias is not None
    with on_device(x):
        matmul = _matmul(x.device.index, backward, *shape, addresses & -addresses)
        matmul.launch(x, weight, z, out, bias)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Launches the forward matmul: x (M, K), weight (N, K) -> z and h (M, N).

    M is at least 1, K and N are multiples of 8; x and weight of one 16-bit dtype.
    """
    x, weight = _aligned(x), _aligned(weight)
    size = x.shape[0], weight.shape[0]
    z, h = (torch.empty(size, dtype=x.dtype, device=x.device) for _ in range(2))
    _launch(False, x, weight, z, h, None if bias is None else _aligned(bias.to(x.dtype)))
    return z, h


def backward(
    dy: Tensor, weight: Tensor, z: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Launches the backward matmul: dy (M, K), weight (K, N), z (M, N) -> dz (M, N), dbias (N,).

    dbias is rounded to 16 bits, as PyTorch's is; None without a bias.
    """
    dy, weight, z = _aligned(dy), _aligned(weight), _aligned(z)
    dz = torch.empty_like(z)
    sums = None if bias is None else torch.empty(z.shape[1], dtype=z.dtype, device=z.device)
    _launch(True, dy, weight, z, dz, sums)
    return dz, None if bias is None or sums is None else sums.to(bias.dtype)
