"""Every kernel, every config, every architecture: compiled and judged without a GPU.

Compiling needs kernels that are not interpreted, so all of it runs in other processes.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BASELINE = Path(__file__).with_name("aot_baseline.json")


def python(*arguments: str, timeout: float) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.mark.slow
def test_every_kernel_fits_every_architecture(capfd: pytest.CaptureFixture[str]) -> None:
    """No spills, shared memory within the device's, wgmma where wanted, no more than before."""
    done = python("-m", "fastgpt_kernels.tools.aot", "--baseline", str(BASELINE), timeout=900)
    with capfd.disabled():
        print("\n" + done.stdout)
    assert done.returncode == 0, (
        f"{done.stdout}\n{done.stderr}\nwhere the change is meant: "
        f"python -m fastgpt_kernels.tools.aot --baseline {BASELINE.relative_to(ROOT)} --update"
    )


INSPECT_SAMPLES = """
import json
from dataclasses import asdict
from fastgpt_kernels.tools.aot import inspect_all
if __name__ == "__main__":
    usages = inspect_all(["tests.kernels.aot_samples"], ["sm_90", "gfx942"], jobs=2, timeout=20)
    print(json.dumps([asdict(usage) for usage in usages]))
"""


@pytest.mark.slow
def test_harness_names_each_fault(tmp_path: Path) -> None:
    script = tmp_path / "inspect_samples.py"
    script.write_text(INSPECT_SAMPLES)
    done = python(str(script), timeout=300)
    assert done.returncode == 0, done.stderr
    usages = {(u["arch"], u["name"]): u for u in json.loads(done.stdout.splitlines()[-1])}
    for arch in ("sm_90", "gfx942"):
        problems = {name: u["problem"] for (a, name), u in usages.items() if a == arch}
        assert problems["sound"] == problems["matmul"] == ""
        assert usages[arch, "sound"]["registers"] > 0
        assert usages[arch, "matmul"]["widest"] == 128
        assert problems["not a power of two"].endswith("must be a power of 2")
        assert "arguments of product without a type: ['y_ptr']" in problems["argument forgotten"]
    assert usages["sm_90", "spills"]["problem"].startswith("spills ")
    assert usages["sm_90", "endless"]["problem"] == "does not compile: took over 20 s"
    assert usages["sm_90", "no wgmma"]["problem"] == "no wgmma in the PTX"
    assert usages["gfx942", "no wgmma"]["problem"] == ""


COMPARE = """
from fastgpt_kernels.tools.aot import Usage, compare
known = {"sm_90": {"a": [100, 4096], "b": [100, 4096], "c": [100, 4096], "d": [100, 4096]}}
usages = [
    Usage("a", "sm_90", 108, 5120), Usage("b", "sm_90", 109, 0), Usage("c", "sm_90", 1, 5121),
    Usage("d", "sm_90", 500, 0, problem="spills"), Usage("a", "sm_80", 1, 1),
]
assert [u.problem for u in compare(usages, known)] == [
    "", "100 registers in the baseline", "4096 bytes of shared memory in the baseline", "spills",
    "not in the baseline",
]
assert compare(usages, None) == usages
"""


def test_regressions_against_the_baseline_are_found() -> None:
    done = python("-c", COMPARE, timeout=120)
    assert done.returncode == 0, done.stderr


def test_interpreted_kernels_are_refused() -> None:
    command = (
        "import os; os.environ['TRITON_INTERPRET'] = '1'; from fastgpt_kernels.tools import aot; "
    )
    done = python("-c", command + "raise SystemExit(aot.main([]))", timeout=120)
    assert done.returncode == 2
    assert "unset TRITON_INTERPRET" in done.stderr
