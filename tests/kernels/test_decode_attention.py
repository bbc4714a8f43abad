"""decode_attention against the fp64 oracle: positions, chunks, layouts, and what it writes."""

import importlib

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastgpt_kernels import attention, decode_attention, reference
from fastgpt_kernels.configs import Config
from fastgpt_kernels.ops.decode import configs
from fastgpt_kernels.ops.decode.kernels import chunk_size, launch_attention
from tests.kernels.helpers import assert_accurate, registered

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def case(B: int, H: int, S: int, D: int, positions: list[int], dtype: torch.dtype):
    """Random tensors; the caches hold NaN where nothing was written yet."""
    qkv = torch.randn(B, 3 * H * D, device=DEVICE).to(dtype)
    cache = torch.randn(2, B, H, S, D, device=DEVICE).to(dtype)
    for row, position in enumerate(positions):
        cache[:, row, :, position:] = float("nan")
    k_cache, v_cache = cache.unbind(0)
    return qkv, k_cache, v_cache, torch.tensor(positions, device=DEVICE)


def torch_attention(qkv: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor) -> Tensor:
    """PyTorch's own at the same dtype, row by row on the part of the cache that counts."""
    B, H, _, D = k_cache.shape
    q, k, v = qkv.view(B, 3, H, 1, D).unbind(1)
    rows = []
    for b, t in enumerate(positions.tolist()):
        keys, values = (
            torch.cat([cache[b, :, :t], new[b]], 1) for cache, new in ((k_cache, k), (v_cache, v))
        )
        rows.append(F.scaled_dot_product_attention(q[b], keys, values).reshape(H * D))
    return torch.stack(rows)


def check(
    qkv: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor, op=decode_attention
) -> None:
    """Accurate, and of the caches exactly one position a row is changed."""
    k_before, v_before = k_cache.clone(), v_cache.clone()
    oracle = torch_attention(*(x.double() for x in (qkv, k_cache, v_cache)), positions)
    same = torch_attention(qkv, k_cache, v_cache, positions)
    y = op(qkv, k_cache, v_cache, positions)
    assert y.is_contiguous()
    assert_accurate(y, same, oracle, name="y")
    B, H, _, D = k_cache.shape
    rows = torch.arange(B, device=qkv.device)
    k_before[rows, :, positions], v_before[rows, :, positions] = qkv.view(B, 3, H, D).unbind(1)[1:]
    for name, got, want in (("k", k_cache, k_before), ("v", v_cache, v_before)):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True, msg=f"{name}_cache")


@pytest.mark.parametrize("D", [5, 16, 64, 80, 128, 256])
def test_head_dims(D: int, dtype: torch.dtype) -> None:
    check(*case(1, 2, 70, D, [40], dtype))


@pytest.mark.parametrize("chunk", [64, 128, 256], ids="chunk={}".format)
def test_rows_of_all_lengths_in_any_number_of_chunks(
    chunk: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Empty caches, full ones, and positions on either side of the edges of tiles and chunks."""
    module = importlib.import_module("fastgpt_kernels.ops.decode.kernels")
    monkeypatch.setattr(module, "chunk_size", lambda *args: chunk)
    positions = [0, 1, 63, 64, 65, 127, 128, 199]
    check(*case(len(positions), 1, 200, 32, positions, dtype))


@pytest.mark.parametrize("block", [16, 32, 128])
def test_any_tile_gives_the_same(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"default": {256: Config({"BLOCK_N": block}, num_warps=4)}}
    monkeypatch.setattr(configs, "ATTENTION", table)
    check(*case(2, 2, 90, 32, [89, 17], torch.float32))


def test_large_logits(dtype: torch.dtype) -> None:
    qkv, k_cache, v_cache, positions = case(2, 1, 80, 32, [79, 10], dtype)
    qkv[:, :32] *= 100
    check(qkv, k_cache * 10, v_cache, positions)


def test_strided_inputs(dtype: torch.dtype) -> None:
    """Part of a longer cache, as a decoder narrows it, and rows of a wider projection."""
    qkv, k_cache, v_cache, positions = case(3, 2, 100, 32, [3, 60, 49], dtype)
    wide = torch.cat([qkv, qkv], 1)[:, : qkv.shape[1]]
    check(wide, k_cache[:, :, :61], v_cache[:, :, :61], positions)
    backwards = torch.stack([qkv, qkv], 2)[..., 0]  # no unit stride: copied
    check(backwards, k_cache, v_cache, positions)


def test_one_token_at_a_time_is_causal_attention(dtype: torch.dtype) -> None:
    qkv = torch.randn(2, 20, 3 * 64, device=DEVICE).to(dtype)
    want = attention(qkv, 2)
    k_cache, v_cache = torch.full((2, 2, 2, 32, 32), 9.0, device=DEVICE, dtype=dtype).unbind(0)
    for t in range(20):
        at = torch.full((2,), t, device=DEVICE)
        got = decode_attention(qkv[:, t], k_cache, v_cache, at)
        torch.testing.assert_close(got, want[:, t], rtol=2e-3, atol=2e-3)


def test_scale() -> None:
    qkv, k_cache, v_cache, positions = case(1, 1, 30, 64, [20], torch.float32)
    got = decode_attention(qkv, k_cache, v_cache, positions, scale=0.5)
    qkv[:, :64] *= 0.5 * 8  # the default scale is 1/8
    torch.testing.assert_close(got, decode_attention(qkv, k_cache, v_cache, positions))


def test_positions_outside_write_nowhere_else() -> None:
    """A spent row (position S and beyond) costs nothing but its own last position."""
    for position, row in ((30, 29), (10**6, 29), (-5, 0)):
        qkv, k_cache, v_cache, _ = case(2, 1, 30, 32, [0, 0], torch.float32)
        memory = torch.zeros(2, 90, 32, device=DEVICE)
        k, v = memory[:, 30:60].reshape(2, 1, 1, 30, 32).unbind(0)
        positions = torch.tensor([position], device=DEVICE)
        for op in (decode_attention, reference.decode_attention):
            op(qkv[:1], k, v, positions)
            touched = k.ne(0).any(-1).nonzero()[:, -1].unique().tolist()
            assert touched == [row]


def test_the_reference_is_the_oracle() -> None:
    check(*case(3, 2, 50, 24, [0, 20, 49], torch.float64), op=reference.decode_attention)


def test_the_registered_op(dtype: torch.dtype) -> None:
    qkv, k_cache, v_cache, positions = case(2, 2, 40, 32, [30, 39], dtype)
    k_cache.nan_to_num_(), v_cache.nan_to_num_()
    torch.library.opcheck(registered("decode_attention"), (qkv, k_cache, v_cache, positions, 0.2))


def test_compiled_in_one_graph() -> None:
    def step(qkv: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor) -> Tensor:
        return decode_attention(qkv * 1.0, k_cache, v_cache, positions) * 1.0

    backend = "inductor" if torch.cuda.is_available() else "aot_eager"
    check(
        *case(2, 2, 40, 32, [30, 39], torch.float32),
        op=torch.compile(step, fullgraph=True, backend=backend),
    )


def test_chunks_fill_the_gpu_and_no_more() -> None:
    """GPT-2 124M on 132 SMs: 16 chunks for one row, fewer for more, one for many."""
    sizes = [chunk_size(1024, 12 * rows, 132, 64) for rows in (1, 8, 16, 64)]
    assert sizes == [64, 192, 384, 1024]
    assert chunk_size(1, 12, 132, 64) == 64


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"qkv": torch.zeros(2, 95)}, ValueError, "qkv must have shape"),
        ({"qkv": torch.zeros(2, 2, 96)}, ValueError, "qkv must have 2 dimensions"),
        ({"k_cache": torch.zeros(2, 1, 8, 32).half()}, TypeError, "k_cache must be of dtype"),
        ({"v_cache": torch.zeros(2, 1, 9, 32)}, ValueError, "v_cache must have shape"),
        ({"positions": torch.zeros(2).int()}, TypeError, "positions must be of dtype int64"),
        ({"positions": torch.zeros(3).long()}, ValueError, "positions must have shape"),
        ({"v_cache": torch.zeros(2, 8, 1, 32).transpose(1, 2)}, ValueError, "the same strides"),
        ({"scale": 0.0}, ValueError, "scale must be finite and > 0"),
    ],
)  # fmt: skip
def test_bad_arguments(change: dict, error: type, message: str) -> None:
    arguments = {
        "qkv": torch.zeros(2, 96),
        "k_cache": torch.zeros(2, 1, 8, 32),
        "v_cache": torch.zeros(2, 1, 8, 32),
        "positions": torch.zeros(2, dtype=torch.int64),
        "scale": None,
        **change,
    }
    moved = {k: x.to(DEVICE) if isinstance(x, Tensor) else x for k, x in arguments.items()}
    with pytest.raises(error, match=message):
        decode_attention(**moved)


@pytest.mark.cuda
@pytest.mark.parametrize("B", [1, 16])
def test_a_graph_follows_the_positions(B: int) -> None:
    """Captured once at position 0, replayed at all others; GPT-2's shape in bf16."""
    S, H, D = 1024, 12, 64
    positions = torch.zeros(B, dtype=torch.int64, device="cuda")
    qkv, k_cache, v_cache, _ = case(B, H, S, D, [0] * B, torch.bfloat16)
    launch_attention(qkv, k_cache, v_cache, positions, D**-0.5)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = launch_attention(qkv, k_cache, v_cache, positions, D**-0.5)
    k_cache.normal_(), v_cache.normal_()
    for t in (0, 1, 63, 64, 500, 1023):
        positions.fill_(t)
        qkv.normal_()
        same = torch_attention(qkv, k_cache, v_cache, positions)
        oracle = torch_attention(*(x.double() for x in (qkv, k_cache, v_cache)), positions)
        graph.replay()
        assert_accurate(y, same, oracle, name=f"t={t}")


@pytest.mark.cuda
def test_bitwise_the_same_every_time() -> None:
    qkv, k_cache, v_cache, positions = case(3, 12, 1024, 64, [5, 700, 1023], torch.bfloat16)
    first = decode_attention(qkv, k_cache, v_cache, positions)
    for _ in range(1000):
        assert torch.equal(decode_attention(qkv, k_cache, v_cache, positions), first)
