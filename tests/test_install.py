"""Wheels of the whole and of the kernels alone, each installed into an empty environment."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
KERNELS = """
import importlib.util, sys, torch, fastgpt_kernels
from fastgpt_kernels import layer_norm, reference
x, weight = torch.randn(5, 64), torch.randn(64, requires_grad=True)
y = layer_norm(x, weight)
torch.testing.assert_close(y, reference.layer_norm(x, weight))
y.sum().backward()
assert weight.grad is not None and "site-packages" in fastgpt_kernels.__file__
print(fastgpt_kernels.__version__, importlib.util.find_spec("fastgpt") is not None)
"""


def run(python: Path | str, *args: str, cwd: Path = Path("/"), **environment: str) -> str:
    got = subprocess.run(
        [str(python), *args], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert got.returncode == 0, got.stdout + got.stderr
    return got.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("project", "packages"),
    [("kernels", {"fastgpt_kernels"}), (".", {"fastgpt", "fastgpt_kernels", "bench"})],
)
def test_a_wheel_in_an_empty_environment(project: str, packages: set[str], tmp_path: Path):
    pytest.importorskip("hatchling", reason="needs pip install hatchling")
    build = (sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path))
    run(*build, cwd=ROOT / project, **os.environ)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (archive.read(n).decode() for n in names if n.endswith("/METADATA"))
        venv.create(tmp_path / "env", with_pip=False)
        (site,) = (tmp_path / "env").glob("lib/python*/site-packages")
        archive.extractall(site)
    assert {n.split("/")[0] for n in names if ".dist-info/" not in n} == packages
    version = re.search(r"^Version: (.*)$", metadata, re.M)[1]  # type: ignore[index]
    needed = set(re.findall(r"^Requires-Dist: (\w+)(?!.*extra)", metadata, re.M))
    assert needed == {"torch", "triton"} or project == "."
    (site / "torch.pth").write_text(str(Path(torch.__file__).parents[1]))
    python = tmp_path / "env" / "bin" / "python"
    for interpret in ("0", "1"):
        said = run(python, "-c", KERNELS, HOME=str(tmp_path), TRITON_INTERPRET=interpret)
        assert said == f"{version} {project == '.'}\n"
    if project == ".":
        assert run(python, "-m", "fastgpt", "version") == f"fastgpt {version}\n"
        assert "waterfall" in run(python, "-m", "bench", "--help")
