"""The launch-config tables: lookup rules and the shape of every table there is."""

import pytest

from fastgpt_kernels.launch import Config, lookup
from fastgpt_kernels.specs import configs_of, spec_modules

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
    modules = map(configs_of, spec_modules())
    named = ((f"{m.__name__}.{n}", t) for m in modules for n, t in vars(m).items())
    tables = {n: t for n, t in named if isinstance(t, dict) and n.rpartition(".")[2][0].isupper()}
    assert len(tables) > 20
    for name, table in tables.items():
        assert "default" in table, name
        for arch, entries in table.items():
            keys = list(entries)
            assert keys and keys == sorted(keys), f"{name}[{arch}]: keys must rise, got {keys}"
            for config in entries.values():
                assert config.num_warps in (1, 2, 4, 8, 16, 32), f"{name}[{arch}]: {config}"
