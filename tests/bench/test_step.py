"""The step, the ablation and the sweep: who gets a time, and what is made of it."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import ablate, results, setup, step, turns
from bench.turns import Measured
from bench.variants import FAST, PEER, Variant, build
from fastgpt.config import settings
from fastgpt.config.schema import Config
from fastgpt.errors import UserError

ROOT = Path(__file__).parents[2]
TINY = ["--n_layer=1", "--n_embd=32", "--block_size=16", "--device=cpu", "--peak_tflops=1"]
BUILT = {
    "losses": [6.0, 5.5],
    "grad_norms": [2.0, 1.0],
    "choices": [],
    "warm_up_s": 1.0,
    "source": "",
}

# A stand-in for nanoGPT's model.py, with its face: our own model, right or 20 % off.
FAKE_PEER = """
from dataclasses import dataclass
from fastgpt.model.gpt import GPT as Ours, ModelShape

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool

class GPT(Ours):
    def __init__(self, c):
        print("nanoGPT's model talks")
        super().__init__(
            ModelShape(c.n_layer, c.n_head, c.n_embd, c.block_size, c.vocab_size, c.bias)
        )

    def forward(self, idx, targets):
        return None, super().forward(idx, targets) * FACTOR
"""


def write_peer(folder: Path, factor: float) -> str:
    folder.mkdir()
    (folder / "model.py").write_text(FAKE_PEER.replace("FACTOR", str(factor)))
    return str(folder)


@pytest.mark.slow
def test_real_steps_take_turns(tmp_path: Path) -> None:
    """Ours, ours from another checkout, a peer, and a wrong peer."""
    other = tmp_path / "other"
    for name in ("fastgpt", "kernels"):
        shutil.copytree(ROOT / name, other / name, ignore=shutil.ignore_patterns("__pycache__"))
    variants = [
        Variant("eager"),
        Variant("other checkout", root=str(other)),
        Variant("peer", kind=PEER, path=write_peer(tmp_path / "peer", 1.0)),
        Variant("wrong", kind=PEER, path=write_peer(tmp_path / "wrong", 1.2)),
    ]
    config, vocab_size = setup.configure("gpt2", dict(f[2:].split("=") for f in TINY))
    seen = []
    ours, elsewhere, peer, wrong = turns.measure(
        variants,
        config,
        vocab_size,
        rounds=2,
        turn_s=0.01,
        builders=2,
        progress=lambda found: seen.append([len(m.samples) for m in found]),
    )
    assert not ours.problem and not elsewhere.problem and not peer.problem
    assert ours.built["source"] == str(ROOT / "fastgpt/__init__.py")
    assert elsewhere.built["source"] == str(other / "fastgpt/__init__.py")
    assert ours.built["losses"] == elsewhere.built["losses"]
    assert turns.apart(peer.built["losses"], ours.built["losses"]) < 1e-5
    assert ours.built["losses"][-1] < ours.built["losses"][0] - 0.05  # it does learn
    assert seen == [[0] * 4, [0] * 4, [1, 1, 1, 0], [2, 2, 2, 0]]
    assert all(ms > 0 for ms in ours.samples)
    assert ours.peak_bytes > 1e7
    assert wrong.problem.startswith("wrong: losses differ from eager's by 20.0%")
    assert not wrong.samples


@pytest.mark.slow
def test_one_at_a_time() -> None:
    """Each gets all its turns before the next is built; rows can be made of what there is."""
    config, vocab_size = setup.configure("gpt2", dict(f[2:].split("=") for f in TINY))
    seen = []

    def progress(found: Any) -> None:
        seen.append([len(m.samples) for m in found])
        step.rows_of(found, "gpt2", config, vocab_size, {})

    variants = [Variant("eager"), Variant("again")]
    found = turns.measure(
        variants, config, vocab_size, rounds=3, turn_s=0.01, alive="one", progress=progress
    )
    assert seen == [[0, 0], [0, 0], [3, 0], [3, 0], [3, 3]]
    assert not any(m.problem for m in found)


@pytest.mark.parametrize(("device", "chosen"), [("cuda", 0), ("cuda:0", 1), ("cpu", 0)])
def test_only_a_gpu_with_a_number_is_chosen(
    device: str, chosen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch refuses to make a device without one the current one, which it is already."""
    seen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", seen.append)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    monkeypatch.setattr(turns, "build", lambda *a: "built")
    config = settings.replace(Config(), device=device)
    assert turns.quietly_built(Variant("eager"), config, 65) == "built"
    assert len(seen) == chosen


def test_a_step_that_is_cut_short_keeps_its_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the third round: three samples of each, no interval yet; before: a reason."""

    def measure(variants: list[Variant], *_: Any, progress: Any, **__: Any) -> list[Measured]:
        progress([Measured(v) for v in variants])
        (path,) = results.files(tmp_path)
        assert {r["problem"] for r in results.load(path)["rows"]} == {results.NOT_YET}
        progress([Measured(v, BUILT, [9.0, 10.0, 11.0], 1, 1) for v in variants])
        raise KeyboardInterrupt

    monkeypatch.setattr(turns, "measure", measure)
    for main, args in ((step.main, ["gpt2", "--variants=eager,compile"]), (ablate.main, [])):
        with pytest.raises(KeyboardInterrupt):
            main([*args, f"--out={tmp_path}", *TINY])
        (path,) = results.files(tmp_path)
        data = results.load(path)
        assert not data["complete"] and data["rows"][1]["median_ms"] == 10.0
        assert data["rows"][1]["ratio"]["low"] is None
        path.unlink()


@pytest.mark.parametrize(
    ("losses", "norms", "right"),
    [
        ([6.0, 5.52], [2.05, 9.0], True),
        ([6.0, 5.6], [2.0, 1.0], False),
        ([6.0, 5.5], [2.2, 1.0], False),
        ([6.0, math.nan], [2.0, 1.0], False),
    ],
)
def test_judge(losses: list[float], norms: list[float], right: bool) -> None:
    found = [
        Measured(Variant("eager"), BUILT),
        Measured(Variant("kernels"), BUILT | {"losses": losses, "grad_norms": norms}),
    ]
    turns.judge(found, dropout=0.0)
    assert not found[0].problem and bool(found[1].problem) != right


def fake_measure(ms: dict[str, float]) -> Any:
    """`turns.measure` with known times: as given by the variant's name, else 10 ms."""

    def measure(variants: list[Variant], *_: Any, **__: Any) -> list[Measured]:
        noise = [0.99, 1.0, 1.0, 1.01, 1.0, 0.995]
        return [
            Measured(v, BUILT, [ms.get(v.name, 10.0) * n for n in noise], 2**30, 2**30)
            for v in variants
        ]

    return measure


def test_numbers_of_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variant_ms = {"eager": 20.0, "compile": 10.5}
    monkeypatch.setattr(turns, "measure", fake_measure(variant_ms))
    args = ["gpt2", "--variants=eager,compile,hf", f"--out={tmp_path}", *TINY]
    assert step.main(args) == 0
    (path,) = results.files(tmp_path)
    eager, compiled, hf = results.load(path)["rows"]
    assert compiled["ratio"]["verdict"] == hf["ratio"]["verdict"] == "faster"
    assert compiled["ratio"]["ratio"] == pytest.approx(10.5 / 20)
    config, vocab_size = setup.configure("gpt2", dict(f[2:].split("=") for f in TINY))
    rate = 4 * 16 / 20e-3
    flops = setup.flops_per_token(config, vocab_size)
    assert eager["tokens_per_second"] == pytest.approx(rate)
    assert eager["mfu"] == pytest.approx(flops.mfu * rate / 1e12)
    assert eager["mfu"] > eager["mfu_causal"] > eager["mfu_6n"] > 0


def test_ablation_of_known_worth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(turns, "measure", fake_measure({"attention eager": 10.5}))
    assert ablate.main([f"--out={tmp_path}", *TINY]) == 0
    (path,) = results.files(tmp_path)
    rows = {r["variant"]: r for r in results.load(path)["rows"]}
    assert rows["attention eager"]["worth_ms"][0] == pytest.approx(0.5)
    assert rows["attention eager"]["ratio"]["verdict"] == "slower"
    assert rows["bias_gelu eager"]["ratio"]["verdict"] == "no difference"
    assert "attention: its kernel is worth +0.500 ms" in capsys.readouterr().out


def test_ablation_switches_what_the_fast_path_leaves_to_libraries() -> None:
    def overrides(arch: str) -> list[tuple[str, str]]:
        fast, *others = ablate.contenders(arch)
        assert fast.settings == FAST
        changed = [v.settings.items() - FAST.items() for v in others]
        return [(op.removeprefix("op."), to) for ((op, to),) in changed]

    hopper = overrides("sm_90")
    assert hopper[0] == ("attention", "hopper") and ("attention", "eager") in hopper
    ampere = overrides("sm_80")
    assert ("bias_gelu", "eager") in ampere and ("attention", "hopper") not in ampere
    ratio = {"ratio": 0.97, "low": 0.96, "high": 0.98}
    found = ablate.worth({"variant": "attention hopper", "ratio": ratio}, 100.0)
    assert found == pytest.approx([3.0, 2.0, 4.0])


def test_sweep_rows_have_keys_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "measure", fake_measure({}))
    args = ["laptop", "--variants=eager", "--sweep=n_embd", f"--out={tmp_path}", *TINY]
    assert step.main([*args, "--values=32,64"]) == 0
    (path,) = results.files(tmp_path)
    keys = [r["key"] for r in results.load(path)["rows"]]
    assert keys == ["laptop n_embd=32 eager", "laptop n_embd=64 eager"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--n_layr=2"], "did you mean --n_layer"),
        (["gtp2"], "did you mean gpt2"),
        (["--variants=fast"], "no 'fast'"),
        (["--variants=peer"], "needs --peer-path"),
        (["--peer-path=/nowhere"], "--peer-path=/nowhere: there is no model.py in it"),
        (["--rounds=3"], "must be at least 6"),
        (["laptop", "--sweep=n_embd", "--values=33"], "no multiple of the head dim"),
        (["--sweep=batch", "--values=0"], "must be at least 1"),
    ],
)
def test_bad_arguments(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        step.main([*args, *TINY])
    assert message in capsys.readouterr().err


def test_what_cannot_be_built(tmp_path: Path) -> None:
    config, vocab_size = setup.configure("gpt2", dict(f[2:].split("=") for f in TINY))
    with pytest.raises(UserError, match="no GPU"):
        build(Variant("kernels", {"kernels": "triton"}), config, vocab_size)
    with pytest.raises(UserError, match="there is no model.py"):
        build(Variant("peer", kind=PEER, path=str(tmp_path)), config, vocab_size)
