"""The MLP by its fused implementations: the emulator for Hopper, and a cuBLASLt without a GPU."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.gluon.emulator import emulated  # isort: skip - before Gluon is
from fastgpt_kernels import mlp_cublaslt, mlp_hopper, reference
from fastgpt_kernels.registry import Sizes, spec
from tests.kernels import fake_cublaslt
from tests.kernels.helpers import assert_accurate, forward_backward, module_of, registered

MODULE = module_of("mlp")
FUSED: dict[str, Any] = {"hopper": MODULE.hopper_mlp, "cublaslt": MODULE.cublaslt_mlp}


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> fake_cublaslt.FakeLibrary:
    """CPU tensors go to a cuBLASLt that computes on the CPU."""
    fake, stream = fake_cublaslt.FakeLibrary(), SimpleNamespace(cuda_stream=fake_cublaslt.STREAM)
    monkeypatch.setattr(mlp_cublaslt, "library", lambda: fake)
    monkeypatch.setattr(mlp_cublaslt, "unsupported_reason", lambda arch: None)
    monkeypatch.setattr(torch.cuda, "current_blas_handle", lambda: fake_cublaslt.HANDLE)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    mlp_cublaslt._matmul.cache_clear()
    return fake


@pytest.fixture(params=FUSED)
def name(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, library: Any
) -> Iterator[str]:
    """An implementation's name; its kernels take CPU tensors as they would take a GPU's."""
    unsupported = MODULE.gluon_unsupported
    monkeypatch.setattr(
        MODULE, "gluon_unsupported", lambda sizes, dtype, _: unsupported(sizes, dtype, "sm_90")
    )
    with emulated(seed=3):
        yield request.param


@pytest.fixture
def fused(name: str) -> Callable[..., Tensor]:
    return FUSED[name]


def inputs(tokens: int, dtype: torch.dtype, C: int = 72) -> list[Tensor]:
    """Returns x (2, tokens / 2, C), W1, b1, W2 and b2; weights and biases are fp32."""
    generator = torch.Generator().manual_seed(tokens)
    shapes = (2, tokens // 2, C), (4 * C, C), (4 * C,), (C, 4 * C), (C,)
    x, *rest = (torch.randn(shape, generator=generator) for shape in shapes)
    return [x.to(dtype), *(w * w.shape[-1] ** -0.5 for w in rest)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_as_accurate_as_pytorch(dtype: torch.dtype, fused: Callable[..., Tensor]) -> None:
    """y, and the gradients of x, the weights and the biases."""
    given = inputs(140, dtype)
    dy = torch.randn(2, 70, 72).to(dtype)
    found, same, oracle = (
        forward_backward(f, args, [dy.to(args[0].dtype)])
        for f, args in (
            (fused, given),
            (reference.mlp, given),
            (reference.mlp, [t.double() for t in given]),
        )
    )
    for part in (0, 1):
        for x, y, z in zip(found[part], same[part], oracle[part], strict=True):
            assert_accurate(x, y, z, name=str(tuple(z.shape)))


def test_main_grads_and_copies(fused: Callable[..., Tensor]) -> None:
    """The copies are what is multiplied; fp32 gradients are added to what is there."""
    given = inputs(128, torch.bfloat16)
    copies = given[1].to(torch.bfloat16), given[3].to(torch.bfloat16)
    _, wanted = forward_backward(fused, given, [torch.ones(2, 64, 72).bfloat16()])
    wrong = [torch.full_like(w, torch.nan) for w in given[1:4:2]]
    leaves = [given[0], wrong[0], given[2], wrong[1], given[4]]
    leaves = [x.detach().requires_grad_() for x in leaves]
    main_grads = tuple(torch.ones_like(x) for x in leaves[1:4:2])
    y = fused(*leaves, weights_bf16=copies, main_grads=main_grads)
    y.backward(torch.ones(2, 64, 72).bfloat16())
    assert leaves[1].grad is None and leaves[3].grad is None
    for total, x in zip(main_grads, wanted[1:4:2], strict=True):
        assert (total - 1 - x).norm() < 4e-3 * x.norm()  # alone it was rounded to bf16
    assert torch.equal(leaves[0].grad, wanted[0]) and torch.equal(leaves[2].grad, wanted[2])


def test_without_biases_and_no_contiguous_gradient(fused: Callable[..., Tensor]) -> None:
    x, fc, _, proj, _ = inputs(130, torch.float16)
    leaves = [t.detach().requires_grad_() for t in (x, fc, proj)]
    fused(leaves[0], leaves[1], None, leaves[2]).sum().backward()  # strides of zero
    exact = [t.detach().double().requires_grad_() for t in (x, fc, proj)]
    reference.mlp(exact[0], exact[1], None, exact[2]).sum().backward()
    for a, b in zip(leaves, exact, strict=True):
        assert (a.grad.double() - b.grad).norm() < 2e-3 * b.grad.norm()


@pytest.mark.parametrize(
    ("tokens", "C", "dtype", "approximate"),
    [
        (126, 72, torch.float16, "tanh"),
        (128, 76, torch.float16, "tanh"),
        (128, 72, torch.float16, "none"),
        (128, 72, torch.float32, "tanh"),
    ],
    ids=["fewer rows than a tile", "not aligned", "erf", "fp32"],
)
def test_what_is_left_to_other_ops(
    tokens: int, C: int, dtype: torch.dtype, approximate: str, name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Where the fused kernels cannot be meant, the results are those of `mlp`."""
    tokens = 0 if (tokens, name) == (126, "cublaslt") else tokens  # it takes any row
    for module in (mlp_hopper, mlp_cublaslt):
        monkeypatch.setattr(module, "forward", None)
    given, dy = inputs(tokens, dtype, C), torch.randn(2, tokens // 2, C).to(dtype)
    found, wanted = (
        forward_backward(lambda *a, f=f: f(*a, approximate), given, [dy])
        for f in (FUSED[name], MODULE.mlp)
    )
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_the_registered_ops(name: str) -> None:
    x, fc, bias, proj, _ = (t.to(torch.float16) for t in inputs(128, torch.float16))
    x, checks = x.view(128, 72), ("test_schema", "test_faketensor")
    for b in (bias, None):
        forward = (x, fc.t(), b)
        torch.library.opcheck(registered(f"mlp_{name}"), forward, test_utils=checks)
        z, _ = registered(f"mlp_{name}")(*forward)
        arguments = (torch.ones_like(x), proj, z, b)
        torch.library.opcheck(registered(f"mlp_{name}_backward"), arguments, test_utils=checks)


def test_errors() -> None:
    x, fc, bias, proj, _ = inputs(4, torch.float32)
    for function in (MODULE.mlp, *FUSED.values()):
        with pytest.raises(ValueError, match=r"^mlp: proj_weight must have shape \(\*, 288\)"):
            function(x, fc, bias, fc)
        with pytest.raises(TypeError, match="^mlp: fc_bias must be a tensor, got str"):
            function(x, fc, "bias", proj)


def test_second_derivatives_raise(fused: Callable[..., Tensor]) -> None:
    x, fc, bias, proj, _ = inputs(128, torch.float16)
    x.requires_grad_()
    with pytest.raises(RuntimeError, match="^mlp: has no second derivative"):
        torch.autograd.grad(fused(x, fc, bias, proj).sum(), x, create_graph=True)


def test_reasons_why_not(library: Any) -> None:
    def why(name: str, arch: str = "sm_90", dtype: Any = torch.bfloat16, **sizes: Any) -> Any:
        return spec("mlp").unsupported_reason(name, arch, dtype, Sizes(**sizes))

    assert why("hopper", "sm_100") == "hopper is for sm_90, not sm_100"
    assert why("cublaslt", "sm_100") is None
    for name in FUSED:
        assert why(name) == why(name, n_embd=1608) == why(name, dtype=torch.float16) is None
        said = f"{name} is for bfloat16 and float16, not float32"
        assert why(name, dtype=torch.float32) == said
        assert why(name, gelu="erf") == f"{name} has GELU by tanh only"
        assert why(name, n_embd=772) == f"{name} has widths divisible by 8, not 772"


# --- cuBLASLt ---------------------------------------------------------------------------------


def test_a_shape_asks_the_heuristics_once(
    library: fake_cublaslt.FakeLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls of a shape share descriptors; another shape, dtype, bias or alignment has its own."""
    monkeypatch.setattr(mlp_cublaslt, "MOST_ALIGNED", 64)  # as a CPU's tensors are, all of them
    x, fc, bias, proj, _ = (t.half() for t in inputs(16, torch.float16))
    x = x.view(16, 72)
    calls: list[tuple[Any, ...]] = [(x, fc, bias), (x[:8], fc, bias), (x, fc, None)]
    calls.append(tuple(t.bfloat16() for t in (x, fc, bias)))
    calls.append((torch.cat([x.flatten(), x[0]])[8 : 8 + x.numel()].view(16, 72), fc, bias))
    for arguments in calls:
        found = [mlp_cublaslt.forward(*arguments) for _ in range(3)]
        assert all(map(torch.equal, found[0], found[2]))
    for _ in range(2):
        mlp_cublaslt.backward(x, proj, found[0][0], bias)
    asked = library.calls.count("cublasLtMatmulAlgoGetHeuristic")
    assert asked == len(calls) + 1 and library.calls.count("cublasLtMatmul") == 3 * len(calls) + 2


def test_rows_at_odd_addresses_are_copied(library: fake_cublaslt.FakeLibrary) -> None:
    x, fc, bias, *_ = (t.half() for t in inputs(16, torch.float16))
    x = x.view(16, 72)
    odd = torch.cat([x.flatten()[:1], x.flatten()])[1:].view(16, 72)
    assert odd.data_ptr() % 16
    assert all(
        map(torch.equal, mlp_cublaslt.forward(odd, fc, bias), mlp_cublaslt.forward(x, fc, bias))
    )


@pytest.mark.parametrize(
    "failing", ["MatmulDescCreate", "MatrixLayoutCreate", "MatmulAlgoGetHeuristic", "Matmul"]
)
def test_an_error_of_the_library_is_named(failing: str, library: Any) -> None:
    x, fc, *_ = (t.half() for t in inputs(16, torch.float16))
    library.status[f"cublasLt{failing}"] = 15
    with pytest.raises(
        RuntimeError, match=f"^cublaslt: cublasLt{failing} returned CUBLAS_STATUS_15"
    ):
        mlp_cublaslt.forward(x.view(16, 72), fc, None)


def test_no_algorithm(library: fake_cublaslt.FakeLibrary) -> None:
    x, fc, *_ = (t.half() for t in inputs(16, torch.float16))
    library.found = 0
    with pytest.raises(
        RuntimeError, match="^cublaslt: no algorithm for M=16, N=288, K=72 in torch"
    ):
        mlp_cublaslt.forward(x.view(16, 72), fc, None)


def test_where_there_is_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def why(arch: str) -> str | None:
        return mlp_cublaslt.unsupported_reason(arch)

    mlp_cublaslt.library.cache_clear()
    assert why("cpu") == "cublaslt is for NVIDIA GPUs, not cpu"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert why("sm_90") == "cublaslt: this PyTorch was built without CUDA"
    monkeypatch.setattr(torch.version, "cuda", "99.1")
    assert why("sm_90").startswith("cublaslt: libcublasLt.so.99: cannot open shared object")


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_real_library_takes_the_descriptors(
    backward: bool, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It makes them without a GPU too, up to the heuristics, which then have no handle."""
    mlp_cublaslt.library.cache_clear()
    monkeypatch.setattr(torch.version, "cuda", torch.version.cuda or "13.0")
    if reason := mlp_cublaslt.unsupported_reason("sm_90"):
        pytest.skip(reason)
    monkeypatch.setattr(torch.cuda, "current_blas_handle", lambda: 0)
    with pytest.raises(RuntimeError, match="AlgoGetHeuristic returned CUBLAS_STATUS_NOT_INIT"):
        mlp_cublaslt._Matmul(backward, 1024, 3072, 768, torch.bfloat16, bias, 256)
