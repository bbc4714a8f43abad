"""Plans of runs, from candidates and clocks that the test makes up: what is chosen, what is said,
kept, stored with the run, and taken again by a resume and by other ranks."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastgpt import doctor
from fastgpt.config import settings
from fastgpt.config.presets import gpt2, laptop
from fastgpt.errors import UserError
from fastgpt.model import build, ops
from fastgpt.model.device import Machine
from fastgpt.model.plan import Measured, Plan
from fastgpt.storage import run
from fastgpt.train import tuning
from fastgpt.train.distributed import Ranks
from fastgpt_kernels.plans import device as devices
from fastgpt_kernels.plans.child import Failed
from fastgpt_kernels.plans.measure import using
from tests import runs
from tests.runs import TINY

VOCAB = 256


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch) -> Path:
    """Plans of this test alone, on a machine with three cores of which PyTorch uses two."""
    monkeypatch.setenv("FASTGPT_PLANS", str(tmp_path / "plans"))
    monkeypatch.setattr(devices, "cores", lambda: 3)
    monkeypatch.setattr(devices, "name", lambda device: "test machine")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield tmp_path
    torch.set_num_threads(before)


def cpu(config=None) -> tuple:
    config = config or settings.replace(laptop(), device="cpu", peak_tflops=1.0)
    return config, VOCAB, tuning.machine_of(config)


class Fake:
    """Stands for the processes that measure: milliseconds by name, or what is wrong.

    A name that is not there takes 10 ms; of micro-steps the names begin as given.
    """

    parallel = 1

    def __init__(self, **ms: float | str):
        self.ms, self.now, self.asked = ms, 0.0, Counter()
        self.checked: Counter[str] = Counter()

    def clock(self) -> float:
        return self.now

    def __call__(self, *question) -> Fake:
        self.asked[getattr(question[0], "op", "micro-step")] += 1
        return self

    def _ms(self, name: str) -> float | str:
        return next((v for k, v in self.ms.items() if name.startswith(k)), 10.0)

    def check(self, candidate) -> None:
        self.now += 3
        self.checked[candidate.name] += 1
        if isinstance(why := self._ms(candidate.name), str):
            raise Failed(why)

    def time(self, candidate) -> float:
        self.now += 0.1
        return self._ms(candidate.name)

    def tables(self) -> list:
        return []

    def close(self) -> None:
        pass

    def measure(self, *run, seconds: float = 1000.0, **kwargs) -> Plan:
        run = run or cpu()
        return tuning.measure(
            *run,
            seconds,
            clock=self.clock,
            op_measurer=self,
            micro_measurer=self,
            rounds=8,
            **kwargs,
        )


WINS = {"flash": 5.0, "winners (attention flash), not compiled, 1": 4.0}
ALL = {
    f"{table}, {how}, {n}"
    for table in ("default", "winners (attention flash)")
    for how in ("compiled", "not compiled")
    for n in ("1 thread", "2 threads", "3 threads")
}


def test_on_a_cpu_attention_compiling_and_threads_are_chosen(capsys):
    fake = Fake(**WINS)
    plan = fake.measure()
    assert plan.ops["attention"].implementation == "flash"
    assert (plan.compile, plan.threads, plan.arch) == (False, 1, "cpu")
    assert plan.ops["attention"].reason.startswith("measured ")
    assert {name for name in fake.checked if ", " in name} == ALL
    # The next one reads it, and measures nothing.
    again = Fake()
    assert tuning.known(*cpu()).ops == plan.ops and tuning.complete(*cpu())
    assert again.measure().threads == 1 and not again.checked
    tuning.show(plan, tuning.Store())
    said = capsys.readouterr().out
    assert (
        re.search(r"kernels: measured \d+ s on", said) and "on this test machine (torch 2." in said
    )
    assert "attention         flash   5 ms, 0.500 [0.500, 0.500] of eager's time, 2.00x of" in said
    assert "whole micro-step  winners (attention flash), not compiled, 1 thread: 4 ms" in said


def test_the_parts_mislead_and_the_whole_decides():
    """The winners are slower together: all is as without a plan."""
    plan = Fake(flash=5.0, winners=12.0).measure()
    assert {op: m.implementation for op, m in plan.ops.items()} == {}
    assert (plan.compile, plan.threads) == (None, 0)
    assert any("as without a plan" in line for line in plan.lines)


@pytest.mark.parametrize("ms", ["wrong", "does not answer within 120 s", 9.9, 20.0])
def test_never_worse_than_the_default(ms):
    plan = Fake(flash=ms, math=ms, **{f"default, compiled, {n}": ms for n in "123"}).measure()
    assert plan.compile is None and plan.threads == 0
    assert all(m.implementation == "eager" for m in plan.ops.values())


@pytest.mark.parametrize("seconds", [1, 10, 20, 30, 60, 100])
def test_the_budget_is_held_and_the_rest_comes_at_the_next_start(seconds):
    fake = Fake(**WINS)
    fake.measure(seconds=seconds)
    assert fake.now <= seconds + 3
    for _ in range(10):
        if tuning.complete(*cpu()):
            break
        Fake(**WINS).measure(seconds=max(seconds, 45))
    assert tuning.known(*cpu()).threads == 1


def test_until_the_whole_was_measured_nothing_changes():
    plan = Fake(**WINS).measure(seconds=14)
    assert not plan.ops and any("not measured yet" in line for line in plan.lines)


def test_what_the_settings_say_is_left_alone():
    config = settings.replace(
        laptop(), device="cpu", peak_tflops=1.0, compile=False, **{"op.attention": "eager"}
    )
    fake = Fake(**{"default, 1": 5.0})
    plan = fake.measure(*cpu(config))
    assert set(fake.checked) == {"default, 2 threads", "default, 1 thread", "default, 3 threads"}
    assert (plan.compile, plan.threads, plan.ops) == (None, 1, {})


def test_other_settings_are_another_question():
    Fake(**WINS).measure()
    assert tuning.known(*cpu()).ops
    for change in (
        {"n_embd": 64}, {"batch_size": 4}, {"dropout": 0.1}, {"bias": True}, {"dtype": "bfloat16"},
        {"block_size": 32}, {"n_layer": 2}, {"op.mlp": "eager"}, {"activation_checkpointing": True},
    ):  # fmt: skip
        config = settings.replace(cpu()[0], **change)
        assert not tuning.known(*cpu(config)).ops, change
    assert not tuning.known(cpu()[0], VOCAB + 1, cpu()[2]).ops
    assert tuning.known(*cpu(settings.replace(cpu()[0], max_iters=7, seed=1))).ops


def test_a_gpu_tries_all_eager_too(monkeypatch):
    """The table's default, the winners, and plain PyTorch; without a GPU by a fake one."""
    machine = Machine(torch.device("cuda", 0), "bfloat16", True, 1.0)
    monkeypatch.setattr(tuning.host, "arch", lambda i: "sm_90")
    monkeypatch.setattr(devices, "facts", lambda device: {"device": "fake", "triton": ""})
    run = settings.replace(gpt2(), kernels="auto"), 50257, machine
    questions = [*tuning._questions(*run)]
    # By the records' FLOPs and bytes: what takes most of a step comes first.
    assert questions.index("mlp") < questions.index("attention") < questions.index("layer_norm")
    assert questions[:2] == ["linear_cross_entropy", "mlp"] or questions[0] == "mlp"
    fake = Fake(cudnn=5.0)
    plan = fake.measure(*run)
    micro = [name for name in fake.checked if name.startswith(("default", "winners", "all"))]
    assert micro == ["default", "winners (attention cudnn)", "all eager"]
    assert plan.ops["bias_gelu"].implementation == "triton" and "attention" not in plan.ops
    fake.ms |= {"all eager": 9.0}
    plan = replace_store(fake, run)
    assert {m.implementation for m in plan.ops.values()} == {"eager"} and len(plan.ops) == 7


def replace_store(fake: Fake, run: tuple) -> Plan:
    for path in tuning.Store().folder.glob("*.json"):
        path.unlink()
    return fake.measure(*run)


# --- --tune --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "estimate", "seconds"),
    [("auto", 1100, 0), ("auto", 1300, 60), ("off", 1e9, 0), ("7", 0, 7), ("0", 1e9, 0)],
)
def test_how_long_a_run_may_tune(flag, estimate, seconds, monkeypatch):
    given = []
    monkeypatch.setattr(tuning, "measure", lambda c, v, m, s: given.append(s) or Plan())
    monkeypatch.setattr(tuning, "estimate_s", lambda *_: estimate)
    config = settings.replace(cpu()[0], tune=flag)
    tuning.for_run(*cpu(config))
    assert given == [seconds] * bool(seconds)
    tuning.for_run(*cpu(settings.replace(config, dist_timeout=10.0)), alone=False)
    assert given[1:] == [min(seconds, 5)] * bool(seconds)


def test_what_is_known_is_used_without_measuring_and_off_means_off(monkeypatch, capsys):
    Fake(**WINS).measure()
    monkeypatch.setattr(tuning, "measure", lambda *_: pytest.fail("measured again"))
    assert tuning.for_run(*cpu(settings.replace(cpu()[0], tune="100"))).threads == 1
    assert tuning.for_run(*cpu()).threads == 1
    assert "kernels: as measured 20" in capsys.readouterr().out
    for off in ({"tune": "off"}, {"auto_batch_size": True}, {"parallel": "fsdp"}):
        assert tuning.for_run(*cpu(settings.replace(cpu()[0], **off))) == Plan()


def test_the_length_of_a_run_is_guessed_by_its_flops():
    config, vocab, machine = cpu()
    once = tuning.estimate_s(config, vocab, machine)
    double = settings.replace(config, max_iters=2 * config.run.max_iters)
    assert tuning.estimate_s(double, vocab, machine) == pytest.approx(2 * once)
    assert tuning.estimate_s(gpt2(), 50257, replace(machine, peak_tflops=989.0)) > 1e5


def test_somebody_else_measures(capsys):
    with tuning.Store().measuring("test machine"):
        fake = Fake(**WINS)
        assert fake.measure() == tuning.known(*cpu()) and not fake.checked
    assert "another process measures" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["-1", "soon", "1e400x", ""])
def test_a_wrong_flag_is_said(flag):
    with pytest.raises(UserError, match="--tune=.*wanted auto, off or a number of seconds"):
        settings.check(settings.replace(laptop(), tune=flag))


# --- a plan at work ------------------------------------------------------------------------------

FLASH = Plan(
    {"attention": Measured("flash", "measured 2026-11-25: 5 ms")}, False, 1, "cpu", "here", "2026",
    ("1 s",),
)  # fmt: skip


def test_the_table_follows_the_plan_and_flags_override_it():
    config, vocab, machine = cpu()
    chosen = {c.op: c for c in build.choose(config, vocab, machine, FLASH).choices}
    assert chosen["attention"] == ops.Choice("attention", "flash", "measured 2026-11-25: 5 ms")
    assert chosen["mlp"].reason == "no GPU"
    assert torch.compiler.config.cache_key_tag == "attention=flash"
    flagged = settings.replace(config, **{"op.attention": "math"})
    chosen = {c.op: c for c in build.choose(flagged, vocab, machine, FLASH).choices}
    assert chosen["attention"] == ops.Choice("attention", "math", "--op.attention=math")
    eager = settings.replace(config, kernels="eager")
    chosen = {c.op: c for c in build.choose(eager, vocab, machine, FLASH).choices}
    assert chosen["attention"].implementation == "eager"
    assert torch.compiler.config.cache_key_tag == ""
    elsewhere = replace(FLASH, ops={"attention": Measured("cudnn", "measured")})
    chosen = {c.op: c for c in build.choose(config, vocab, machine, elsewhere).choices}
    assert chosen["attention"] == ops.Choice("attention", "eager", "no GPU")


def test_what_the_machine_takes_from_a_plan():
    machine = Machine(torch.device("cpu"))
    compiled = replace(FLASH, compile=True, threads=0)
    assert compiled.adopt(machine, "auto").compile
    assert not compiled.adopt(machine, False).compile
    assert Plan().adopt(machine, "auto") == machine
    FLASH.adopt(machine, "auto")
    assert torch.get_num_threads() == 1


def test_launch_configs_are_used_on_their_own_architecture_only():
    from fastgpt_kernels.ops.gelu import configs

    one = {
        "room": "fastgpt_kernels.ops.gelu", "table": "FORWARD", "bound": 1 << 31,
        "config": {"blocks": {"ROWS": 2, "BLOCK_C": 256}, "num_warps": 8, "num_stages": 1},
    }  # fmt: skip
    plan = Plan({"bias_gelu": Measured("triton", "measured", (one,))}, arch="sm_90")
    wanted = {"bias_gelu": ("triton", "", "", "measured")}
    assert ops._configs(wanted, "sm_90", plan) == {"bias_gelu": [one]}
    assert ops._configs(wanted, "sm_80", plan) == {}
    assert ops._configs({"bias_gelu": ("triton", "", "--kernels=triton", "")}, "sm_90", plan) == {}
    assert Plan.of(json.loads(json.dumps(plan.to_dict()))).ops["bias_gelu"].configs == (one,)
    before = configs.FORWARD["default"][1 << 31]
    with using([one], "sm_90"):
        assert configs.FORWARD["sm_90"][1 << 31].num_warps == 8
    assert "sm_90" not in configs.FORWARD and configs.FORWARD["default"][1 << 31] == before


@pytest.mark.parametrize(
    "change",
    [{"ops": None}, {"threads": "2"}, {"threads": -1}, {"compile": "yes"}, {"other": 1},
     {"ops": {"attention": {"implementation": 3, "reason": "", "configs": []}}},
     {"ops": {"attention": {"implementation": "x", "reason": "", "configs": [{}]}}},
     {"lines": [1]}],
    ids=str,
)  # fmt: skip
def test_a_plan_is_checked_when_it_is_read(change, tmp_path: Path):
    assert Plan.of(json.loads(json.dumps(FLASH.to_dict()))).ops == FLASH.ops
    run.save_plan(tmp_path, FLASH.to_dict() | change)
    with pytest.raises(UserError, match=r"plan\.json: no plan"):
        tuning.of_run(tmp_path)
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(UserError, match=r"plan\.json: not JSON"):
        tuning.of_run(tmp_path)
    (tmp_path / "plan.json").unlink()
    assert tuning.of_run(tmp_path) == Plan()


def test_the_doctor_says_what_is_chosen_on_which_figures(home: Path, monkeypatch, capsys):
    monkeypatch.chdir(home)
    config = cpu()[0]
    doctor.doctor(config, "laptop")
    said = capsys.readouterr().out
    assert "nothing measured on this device for it yet: fastgpt tune laptop" in said
    Fake(**WINS).measure(config, 256, tuning.machine_of(config))
    doctor.doctor(config, "laptop")
    said = " ".join(capsys.readouterr().out.split())
    assert "attention: flash (measured 20" in said and "2.00x of eager" in said
    assert "UTC on this test machine" in said and "whole micro-step winners" in said
    doctor.doctor(settings.replace(config, tune="off"), "laptop")
    assert "--tune=off: nothing that was measured is used" in capsys.readouterr().out


# --- runs ----------------------------------------------------------------------------------------


def fastgpt(*args: str) -> None:
    """The command line, in this process."""
    from fastgpt import cli

    with pytest.raises(SystemExit) as end:
        cli.main([*args])
    assert end.value.code == 0


def test_a_run_keeps_its_plan_and_a_resume_is_exact(home: Path, monkeypatch, capsys):
    """Whatever is measured in between, the resumed run computes as it began."""
    monkeypatch.chdir(home)
    text = f"--input={runs.write_text(home)}"
    monkeypatch.setattr(tuning, "for_run", lambda *_, **__: FLASH)
    small = (*TINY, text, "--dropout=0.0")
    fastgpt("train", *small, "--out_dir=whole")
    fastgpt("train", *small, "--out_dir=parts", "--max_iters=10")
    assert "attention" in capsys.readouterr().out
    assert json.loads((home / "parts/plan.json").read_text())["threads"] == 1
    monkeypatch.setattr(tuning, "for_run", lambda *_, **__: pytest.fail("a resume asked"))
    torch.set_num_threads(2)
    fastgpt("train", "--init_from=resume", "--out_dir=parts", "--max_iters=20")
    assert torch.get_num_threads() == 1
    assert "flash (measured 2026-11-25: 5 ms): attention" in capsys.readouterr().out
    assert runs.tensor_files(home / "parts") == runs.tensor_files(home / "whole")
    assert tuning.of_run(home / "parts").ops == FLASH.ops


def test_ranks_take_rank_0s(monkeypatch):
    """What rank 0 found reaches the others, which measure nothing."""
    from fastgpt.train import main

    seen = []

    class Second(Ranks):
        def gather(self, value):
            return [FLASH if isinstance(value, Plan) else value, value]

    class Stop(Exception):
        pass

    def built(config, vocab_size, machine, weights, plan):
        seen.append(plan)
        raise Stop

    monkeypatch.setattr(main, "build", built)
    monkeypatch.setattr(main, "open_dataset", lambda folder: Data())
    monkeypatch.setattr(main.tuning, "for_run", lambda *_, **__: pytest.fail("rank 1 measured"))
    config, _, machine = cpu()
    ranks = Second(1, 2)
    monkeypatch.setattr(ranks, "together", lambda: main.ExitStack())
    with pytest.raises(Stop):
        main._train(config, "test", machine, ranks)
    assert seen == [FLASH] and torch.get_num_threads() == 1


class Data:
    vocab_size = VOCAB
    max_id = VOCAB - 1
    tokenizer = None

    class train:  # noqa: N801
        require = staticmethod(lambda block_size: None)

    val = train
