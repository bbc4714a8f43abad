"""The lock file has all that the project needs, at versions in range, each file with its sha256.

That pip refuses other files is pip's promise (`--require-hashes`): `make LOCKED=1 install`.
"""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
LOCK = (ROOT / "requirements.lock").read_text()
# A requirement and the lines that go on from it.
ENTRIES = re.findall(r"^[^#\s][^\\\n]*(?:\\\n[^\\\n]*)*", LOCK, re.MULTILINE)


def locked() -> dict[str, set[str]]:
    """The versions of each package; several where Pythons or systems differ."""
    versions: dict[str, set[str]] = {}
    for entry in ENTRIES:
        name, version = re.match(r"(\S+)==(\S+)", entry).groups()  # type: ignore[union-attr]
        versions.setdefault(name, set()).add(version)
    return versions


def test_every_file_has_its_hash_and_no_address():
    assert len(ENTRIES) > 50
    for entry in ENTRIES:
        first, *hashes = entry.split(" \\\n")
        assert re.fullmatch(r"\S+==[0-9][^\s+]*( ; .*)?", first), "a public version, pinned"
        assert hashes and all(re.fullmatch(r" +--hash=sha256:[0-9a-f]{64}", h) for h in hashes)
    assert "://" not in LOCK and "\n-" not in LOCK, "where files come from is the user's choice"


def test_all_requirements_are_locked_in_range():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    wanted = project["project"]["dependencies"] + extras["test"]
    wanted += project["build-system"]["requires"]
    kernels = tomllib.loads((ROOT / "kernels" / "pyproject.toml").read_text())["project"]
    assert set(kernels["dependencies"]) < set(wanted), "the kernels alone need the same versions"
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    wanted += [line for line in lines if not line.startswith("#")]
    versions = locked()
    for requirement in map(Requirement, wanted):
        found = versions[requirement.name]
        assert all(v in requirement.specifier for v in found), f"{requirement}: {found}; make lock"
