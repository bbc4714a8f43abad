"""A long run that is killed again and again, beside one that is left alone: equal to the bit.

    python -m tests.chaos.soak [--steps=2000] [--seed=0] [--least=20] [--most=60]

Both run side by side on the CPU, one thread each. The one is ended by SIGKILL, SIGTERM or SIGINT
after 20 to 60 seconds, at whatever it does then, and resumed, until it has all its steps. At the
end weights, optimizer state, losses and evaluations of both have to be the same, byte for byte.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fastgpt.storage import checkpoint
from tests import runs

ROOT = Path(__file__).parents[2]
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def start(cwd: Path, *args: str) -> subprocess.Popen:
    """A `fastgpt` command with one thread, its output in a file."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    with open(cwd / "log.txt", "a") as log:
        command = [sys.executable, "-m", "fastgpt", *args]
        return subprocess.Popen(command, cwd=cwd, env=environment, stdout=log, stderr=log)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--least", type=float, default=20.0)
    parser.add_argument("--most", type=float, default=60.0)
    asked = parser.parse_args()
    rng = random.Random(asked.seed)
    home = Path(tempfile.mkdtemp(prefix="fastgpt-soak-"))
    text = runs.write_text(home, n_lines=20_000)
    settings = ["laptop", f"--input={text}", "--tokenizer=byte", f"--max_iters={asked.steps}"]
    settings += ["--batch_size=24", "--dropout=0.1", "--eval_interval=50", "--eval_iters=5"]
    settings += ["--device=cpu", "--peak_tflops=1", "--sample_tokens=0", "--log_interval=1"]
    settings += [f"--lr_decay_iters={asked.steps}", f"--data_dir={home / 'data'}"]
    for name in ("alone", "killed"):
        (home / name).mkdir()
    # The data are prepared once, before both begin.
    first = start(home / "alone", "prepare", f"--input={text}", f"--data_dir={home / 'data'}")
    assert first.wait() == 0
    began = time.monotonic()
    alone = start(home / "alone", "train", *settings, "--out_dir=run")
    run_dir = home / "killed" / "run"
    kills: dict[str, int] = {}
    args = ["train", *settings, "--out_dir=run", "--init_from=auto"]
    while True:
        process = start(home / "killed", *args)
        number = rng.choice(SIGNALS)
        try:
            code = process.wait(rng.uniform(asked.least, asked.most))
        except subprocess.TimeoutExpired:
            process.send_signal(number)
            code = process.wait()
            kills[number.name] = kills.get(number.name, 0) + 1
        if code not in (0, -number, 128 + number):
            print(f"exit code {code}; the log ends:")
            print((home / "killed" / "log.txt").read_text()[-2000:])
            alone.kill()
            return 1
        # Ended after its last save a run is whole: a resume would have nothing left to do.
        if code == 0 or checkpoint.pointer(run_dir, "latest") == checkpoint.name_of(asked.steps):
            break
    if alone.wait() != 0:
        print((home / "alone" / "log.txt").read_text()[-2000:])
        return 1
    other = home / "alone" / "run"
    same = {
        "weights and optimizer": runs.tensor_files(other) == runs.tensor_files(run_dir),
        "every logged step": runs.records(other) == runs.records(run_dir),
        "every evaluation": runs.records(other, "eval") == runs.records(run_dir, "eval"),
    }
    minutes = (time.monotonic() - began) / 60
    ended = ", ".join(f"{n} by {name}" for name, n in sorted(kills.items()))
    print(
        f"{asked.steps} steps in {minutes:.1f} minutes, ended {sum(kills.values())} times: {ended}"
    )
    for what, held in same.items():
        print(f"{what}: {'equal to the bit' if held else 'DIFFERENT'}")
    print(f"both runs are in {home}")
    return 0 if all(same.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
