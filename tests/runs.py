"""Texts and small runs, and readers of the files in which two runs have to be equal."""

from __future__ import annotations

import json
import random
from pathlib import Path

from fastgpt.storage.atomic import sealed, sha256_file


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# A second or less of training: every part is there, all is small.
TINY = words("""laptop --n_layer=2 --n_head=2 --n_embd=32 --block_size=16 --batch_size=4
--dropout=0.1 --eval_iters=2 --log_interval=1 --eval_interval=10 --max_iters=20 --sample_tokens=20
--peak_tflops=1 --device=cpu""")
# A fifth of a second in a forked process that has loaded PyTorch.
SMALL = words("""--n_layer=1 --n_embd=16 --block_size=8 --batch_size=2 --eval_iters=1
--eval_interval=2 --max_iters=6 --sample_tokens=0""")
SMALL = (*TINY, *SMALL)


def write_text(folder: Path, n_lines: int = 400) -> Path:
    """Writes a text file of random lines, the same every time. Returns its path."""
    rng = random.Random(0)
    words = ("cat", "sat", "on", "a", "mat", "and", "saw", "one", "dog", "run", "to", "sea")
    lines = (" ".join(rng.choices(words, k=8)).capitalize() + "." for _ in range(n_lines))
    path = folder / "text.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


def records(run_dir: Path, kind: str = "train") -> list[dict]:
    """Returns the records of metrics.jsonl without times."""
    clock = ("time_ms", "tokens_per_second", "mfu", "mfu_causal", "mfu_6n")
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    found = [r for r in map(json.loads, lines) if r["kind"] == kind]
    return [{k: v for k, v in r.items() if k not in clock} for r in found]


def latest(run_dir: Path) -> Path:
    return run_dir / "checkpoints" / (run_dir / "checkpoints" / "latest").read_text().strip()


def tensor_files(run_dir: Path) -> dict[str, bytes]:
    """Weights and optimizer state of the latest checkpoint, byte for byte."""
    return {p.name: p.read_bytes() for p in sorted(latest(run_dir).glob("*.safetensors"))}


def seal(folder: Path) -> None:
    """Writes the manifest of a checkpoint's changed files anew, as an attacker would."""
    paths = [p for p in folder.iterdir() if p.name != "manifest.json"]
    files = {p.name: {"bytes": p.stat().st_size, "sha256": sha256_file(p)} for p in paths}
    (folder / "manifest.json").write_text(sealed(json.dumps({"files": files})))
