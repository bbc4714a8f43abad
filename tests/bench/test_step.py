"""The step: which variants get a time, and what is made of it."""

import math
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import compare, processes, results, setup, step, variants
from bench.__main__ import main
from bench.processes import Measured, settled
from bench.variants import EAGER, FAST, Variant, swaps

ROOT = Path(__file__).parents[2]
TINY = ["--n_layer=1", "--n_embd=32", "--block_size=16", "--device=cpu", "--peak_tflops=1"]
FLAGS = dict(f[2:].split("=") for f in TINY)
BUILT = {"losses": [6.0, 5.5], "grad_norms": [2.0, 1.0], "ops": [], "warm_up_s": 1.0}

# A stand-in for nanoGPT's model.py, with its face: fastgpt's own model, right or 20 % off.
FAKE_PEER = """
import torch
from types import SimpleNamespace as GPTConfig
from fastgpt.model.gpt import GPT as Own, ModelShape

class GPT(Own):
    def __init__(self, c):
        print("nanoGPT's model talks")
        sizes = c.n_layer, c.n_head, c.n_embd, c.block_size, c.vocab_size, c.bias
        super().__init__(ModelShape(*sizes))

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        groups = [{"params": [], "weight_decay": 0.0}, {"params": [], "weight_decay": weight_decay}]
        for p in self.parameters():
            groups[p.ndim >= 2]["params"].append(p)
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas)

    def forward(self, idx, targets):
        return None, super().forward(idx, targets) * FACTOR
"""


def write_peer(folder: Path, factor: float) -> str:
    folder.mkdir()
    (folder / "model.py").write_text(FAKE_PEER.replace("FACTOR", str(factor)))
    return str(folder)


def turn(ms: float, joules: float | None = None) -> dict[str, Any]:
    """Returns the answer of a variant's process."""
    energy = {"joules": joules, "clock_mhz": joules and 1600.0, "peak_bytes": 2**30}
    throttled = ["power limit"] * bool(joules)
    return {"ms": ms, "throttled": throttled, "reserved_bytes": 2**30, **energy}


def fake_measure(ms: dict[str, float], joules: float | None = None) -> Any:
    """`processes.measure` with known times: as given by the variant's name, else 10 ms."""

    def measure(variants: list[Variant], *args: Any) -> list[Measured]:
        noise, found = [0.99, 1.0, 1.0, 1.01, 1.0, 0.995], list[Measured]()
        for v in variants:
            turns = [turn(ms.get(v.name, 10.0) * n, joules) for n in noise]
            found.append(Measured(v, BUILT, turns))
        for progress in args[5:]:
            progress(found)
        return found

    return measure


@pytest.mark.slow
def test_real_steps_are_interleaved(tmp_path: Path) -> None:
    """fastgpt, fastgpt from another checkout, a peer, and a wrong peer."""
    other = tmp_path / "other"
    for name in ("fastgpt", "kernels"):
        shutil.copytree(ROOT / name, other / name)
    wanted = [
        Variant("eager", EAGER),
        Variant("other checkout", EAGER, root=str(other)),
        Variant("peer", EAGER, write_peer(tmp_path / "peer", 1.0)),
        Variant("wrong", EAGER, write_peer(tmp_path / "wrong", 1.2)),
        Variant("no GPU", FAST),
    ]
    seen, run = list[list[int]](), setup.configure("gpt2", FLAGS)
    found = processes.measure(
        wanted, *run, 2, 0.01, progress=lambda found: seen.append([len(m.turns) for m in found])
    )
    own, elsewhere, peer, wrong, absent = found
    assert not own.problem and not elsewhere.problem and not peer.problem
    assert own.built["source"] == str(ROOT / "fastgpt/__init__.py")
    assert elsewhere.built["source"] == str(other / "fastgpt/__init__.py")
    assert own.built["losses"] == elsewhere.built["losses"]
    assert peer.built["losses"] == pytest.approx(own.built["losses"], rel=1e-5)
    assert own.built["losses"][-1] < own.built["losses"][0] - 0.05  # it does learn
    assert seen == [[0] * 5, [0] * 5, [1, 1, 1, 0, 0], [2, 2, 2, 0, 0]]
    assert all(t["ms"] > 0 and t["peak_bytes"] > 1e7 and t["joules"] is None for t in own.turns)
    assert wrong.problem.startswith("wrong: losses differ from eager's by 20.0%")
    assert absent.problem.startswith("UserError: ") and "no GPU" in absent.problem


@pytest.mark.parametrize(
    ("loss", "norm", "right"),
    [(5.52, 2.05, True), (5.6, 2.0, False), (5.5, 2.2, False), (math.nan, 2.0, False)],
)
def test_judge(loss: float, norm: float, right: bool) -> None:
    other = {"losses": [6.0, loss], "grad_norms": [norm, 9.0]}
    found = [Measured(Variant("", EAGER), BUILT | more) for more in ({}, other)]
    processes.judge(found, dropout=0.0)
    assert not found[0].problem and bool(found[1].problem) != right
    assert settled([10.0, 10.02, 10.01]) and not settled([10.0, 10.1, 10.0])


def test_a_step_cut_short_keeps_its_rounds(tmp_path: Path, monkeypatch: Any) -> None:
    """Killed after the third round: three samples of each, no interval yet; before: a reason."""

    def measure(variants: list[Variant], *args: Any) -> None:
        *_, progress = args
        progress([Measured(v) for v in variants])
        (path,) = results.files(tmp_path)
        assert {r["problem"] for r in results.load(path)["rows"]} == {results.NOT_YET}
        progress([Measured(v, BUILT, [*map(turn, (9.0, 10.0, 11.0))]) for v in variants])
        raise KeyboardInterrupt

    monkeypatch.setattr(processes, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        step.main(["gpt2", "--variants=eager,compile", f"--out={tmp_path}", *TINY])
    (path,) = results.files(tmp_path)
    data = results.load(path)
    assert not data["complete"] and data["rows"][1]["median_ms"] == 10.0
    assert data["rows"][1]["ratio"]["low"] is None


def test_numbers_of_a_row(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    variant_ms = {"eager": 20.0, "compile": 10.5}
    monkeypatch.setattr(processes, "measure", fake_measure(variant_ms, joules=6.4))
    args = ["gpt2", "--variants=eager,compile", f"--out={tmp_path}", "--sustained", *TINY]
    assert step.main(args) == 0
    (path,) = results.files(tmp_path)
    eager, compiled = results.load(path)["rows"]
    assert compiled["ratio"]["verdict"] == "faster" and eager["throttled"] == ["power limit"]
    assert compiled["ratio"]["ratio"] == pytest.approx(10.5 / 20)
    assert compiled["difference_ms"][0] == pytest.approx(-9.5)
    config, vocab_size = setup.configure("gpt2", FLAGS)
    rate, flops = 4 * 16 / 20e-3, setup.flops_per_token(config, vocab_size)
    assert eager["tokens_per_second"] == pytest.approx(rate)
    assert eager["mfu"] == pytest.approx(flops["mfu"] * rate / 1e12)
    assert eager["mfu"] > eager["mfu_causal"] > eager["mfu_6n"] > 0
    assert eager["millijoules_per_token"] == pytest.approx(6.4e3 / 64)
    said = capsys.readouterr().out
    assert "sustained: the clock has settled" in said and "mJ/token" in said and "1600" in said
    monkeypatch.setattr(processes, "measure", fake_measure(variant_ms))
    assert step.main([*args[:3], *TINY]) == 0
    said = capsys.readouterr().out
    assert "J/step" not in said and "short;" in said
    assert "no energy and clock: " in said or torch.cuda.is_available()


def test_swapped_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, vocab_size = setup.configure("gpt2", FLAGS)
    here = [v.name for v in swaps(["each"], False, config, vocab_size)]
    assert here == ["eager", "op.attention=flash"]
    monkeypatch.setattr(variants, "arch_on", lambda device: "sm_90")
    fast, *others = swaps(["each", "compile=False,tf32=True"], True, config, vocab_size)
    assert fast.settings == FAST and others[-1].settings["tf32"] is True
    assert {"op.attention=eager", "op.bias_gelu=eager"} <= {v.name for v in others}
    monkeypatch.undo()
    monkeypatch.setattr(processes, "measure", fake_measure({"op.attention=flash": 9.0}))
    args = ["gpt2", "--swap=op.attention=flash", f"--out={tmp_path}", *TINY]
    assert step.main(args) == 0
    (path,) = results.files(tmp_path)
    base, swapped = results.load(path)["rows"]
    assert base["key"] == "gpt2 eager" and swapped["difference_ms"][2] < -0.5


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("stepp", "no such benchmark; there are step, kernels, "),
        ("step --n_layr=2", "did you mean --n_layer"),
        ("step gtp2", "did you mean gpt2"),
        ("step --variants=fast", "no 'fast'"),
        ("step --variants=peer", "needs --peer-path"),
        ("step --peer-path=/nowhere", "--peer-path=/nowhere: there is no model.py in it"),
        ("step --swap=op.atention=math", "did you mean --op.attention"),
        ("step --rounds=3", "at least 6, got 3"),
        ("kernels atention", "no op 'atention'"),
        ("waterfall lapptop", "did you mean laptop?"),
        ("waterfall laptop --n_head=3", "must divide n_embd"),
        ("curves --variants=muon,muun", "no 'muun'; there are "),
        ("curves --variants=muon:lr_schedule=wst", "wanted one of cosine, wsd"),
        ("curves --rates=1e-3,x", "--rates and --target: "),
    ],
)
def test_bad_arguments(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code: Any = main([*line.split(), *TINY])
    except SystemExit as e:
        code = e.code
    said = capsys.readouterr().err.splitlines()
    assert code == 2 and message in said[-1] and (len(said) == 1 or "usage: " in said[0])


@pytest.mark.parametrize(("ms", "code"), [(10.0, 0), (10.8, 1), (9.0, 0)])
def test_two_commits(ms: float, code: int, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    def git(*args: str) -> bytes:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *args]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True).stdout

    def measure(pair: list[Variant], *args: Any) -> list[Measured]:
        assert [Path(v.root, "file").read_text() for v in pair] == ["one", "two"]
        return fake_measure({"HEAD": ms})(pair)

    git("init")
    for text in ("one", "two"):
        (tmp_path / "file").write_text(text)
        git("add", "file")
        git("commit", "-m", text)
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(processes, "measure", measure)
    out = f"--out={tmp_path}/out"
    assert compare.main(["HEAD~1", "HEAD", "gpt2", out, *TINY]) == code
    assert main(["compare", "HEAD", "nowhere", "gpt2", out, *TINY]) == 2
    assert "nowhere" in capsys.readouterr().err
    assert len(git("worktree", "list").splitlines()) == 1
