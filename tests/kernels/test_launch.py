"""Use of kernels, architectures, launch configs, and row views."""

import sys

import pytest
import torch

from fastgpt_kernels import launch, registry
from fastgpt_kernels.checks import refuse_interpreted_bf16
from fastgpt_kernels.launch import Config, lookup, row_view

SMALL, LARGE, HOPPER = Config({"B": 1}, 1), Config({"B": 2}, 2), Config({"B": 3}, 4, 2)
TABLE = {"default": {64: SMALL, 128: LARGE}, "sm_90": {64: HOPPER}}


def test_meta_tensors_pretend_to_lie_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", False)
    x = torch.empty(2, device="meta", dtype=torch.bfloat16)
    with launch.pretend("sm_89"):
        assert launch.use_kernel(x) and not launch.use_kernel(torch.empty(2))
        assert (launch.arch_of(x), launch.multiprocessors(x)) == ("sm_89", 128)
        refuse_interpreted_bf16("op", x)
    assert not launch.use_kernel(x)
    assert (launch.arch_of(x), launch.multiprocessors(x)) == ("cpu", 2)


def test_lookup_takes_the_nearest_key_at_or_above() -> None:
    for arch, key, wanted in (
        ("sm_80", 1, SMALL), ("sm_80", 64, SMALL), ("sm_80", 65, LARGE), ("sm_80", 1000, LARGE),
        ("sm_90", 64, HOPPER), ("sm_90", 1000, HOPPER),
    ):  # fmt: skip
        assert lookup(TABLE, arch, key) is wanted


def test_config_kwargs() -> None:
    options = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}
    assert HOPPER.options == options and HOPPER.kwargs() == {"B": 3, **options}


def test_every_table_is_well_formed() -> None:
    registry.specs()  # loads every op
    modules = {n: m for n, m in sys.modules.items() if n.startswith("fastgpt_kernels.")}
    named = {f"{m}.{n}": t for m, x in modules.items() for n, t in vars(x).items()}
    tables = {n: t for n, t in named.items() if isinstance(t, dict) and "default" in t}
    assert len(tables) > 10
    for name, table in tables.items():
        for arch, entries in table.items():
            keys = list(entries)
            assert keys and keys == sorted(keys), f"{name}[{arch}]: keys must rise, got {keys}"
            for config in entries.values():
                assert config.num_warps in (1, 2, 4, 8, 16, 32), f"{name}[{arch}]: {config}"


@pytest.mark.parametrize(
    ("x", "copied"),
    [
        (torch.randn(3, 4, 8), False),
        (torch.randn(3, 4, 16)[..., :8], False),
        (torch.randn(8).expand(5, 8), False),
        (torch.randn(4, 3, 8).transpose(0, 1), True),
        (torch.randn(8, 5).t(), True),
        (torch.randn(6, 1).expand(6, 8), True),
    ],
)
def test_row_view_copies_only_where_it_must(x: torch.Tensor, copied: bool) -> None:
    rows = row_view(x)
    assert rows.stride(1) == 1
    assert torch.equal(rows, x.reshape(-1, x.shape[-1]))
    assert (rows.data_ptr() != x.data_ptr()) == copied
