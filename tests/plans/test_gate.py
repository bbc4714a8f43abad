"""Launch configs that spill or lose the tensor cores are left out before a GPU sees them."""

from __future__ import annotations

import pytest

from fastgpt_kernels.plans.child import Child


@pytest.mark.slow
def test_the_gate_prunes_launch_configs_without_a_gpu():
    child = Child("tests.plans.faulty:Gate", {})
    try:
        present = child.ask("judge", {"BLOCK_M": 128, "BLOCK_N": 64}, 8, 3, timeout=200)
        assert present == ""
        spills = child.ask("judge", {"BLOCK_M": 128, "BLOCK_N": 128}, 4, 1, timeout=200)
        assert "attention_forward" in spills and "spills" in spills
        small = child.ask("judge", {"BLOCK_M": 32, "BLOCK_N": 64}, 4, 2, timeout=200)
        assert "matrix products without wgmma" in small
    finally:
        child.close()
