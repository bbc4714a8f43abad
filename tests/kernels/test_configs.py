"""The launch-config tables: lookup rules and the shape of every table there is."""

import sys

import pytest

from fastgpt_kernels import registry
from fastgpt_kernels.launch import Config, lookup

SMALL, LARGE, HOPPER = Config({"B": 1}, 1), Config({"B": 2}, 2), Config({"B": 3}, 4, 2)
TABLE = {"default": {64: SMALL, 128: LARGE}, "sm_90": {64: HOPPER}}


@pytest.mark.parametrize(
    ("arch", "key", "wanted"),
    [
        ("sm_80", 1, SMALL),
        ("sm_80", 64, SMALL),
        ("sm_80", 65, LARGE),
        ("sm_80", 1000, LARGE),
        ("sm_90", 64, HOPPER),
        ("sm_90", 1000, HOPPER),
    ],
)
def test_lookup_takes_the_nearest_key_at_or_above(arch: str, key: int, wanted: Config) -> None:
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
