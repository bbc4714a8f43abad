"""Ops as they are measured, in this process, and `tune` for a model of one's own."""

from __future__ import annotations

import importlib
from dataclasses import asdict, replace

import pytest
import torch

import fastgpt_kernels
from fastgpt_kernels import configs, host
from fastgpt_kernels.configs import Config
from fastgpt_kernels.ops.attention import record as attention_records
from fastgpt_kernels.ops.norm import configs as norm_configs
from fastgpt_kernels.plans import measure, tune
from fastgpt_kernels.plans.child import Failed
from fastgpt_kernels.plans.choose import Candidate, Found, Trial
from fastgpt_kernels.plans.measure import OpBench, using
from fastgpt_kernels.plans.store import Store
from fastgpt_kernels.plans.tune import Question, figures, names
from fastgpt_kernels.registry import Implementation, Sizes, spec, specs

CPU = torch.device("cpu")
SMALL = Sizes(2, 16, 2, 64, 61, 64, gelu="erf")


def bench(op: str, sizes: Sizes = SMALL, **options) -> OpBench:
    return OpBench(op, "cpu", "float32", False, asdict(sizes), **options)


@pytest.fixture(autouse=True)
def short_turns(monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "TURN_MS", 0.1)
    monkeypatch.setenv("FASTGPT_PLANS", str(tmp_path))
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("op", [r.name for r in specs("model")])
def test_every_op_of_the_model_is_measured_as_a_run_calls_it(op):
    there = bench(op)
    there.check({"implementation": "eager"})
    assert 0 < there.turn({"implementation": "eager"}) < 1e4


def test_wrong_ones_are_refused(monkeypatch):
    op = spec("attention")

    def half(qkv, n_head, **options):
        return op.eager(qkv, n_head, **options) * 0.5

    def raises(qkv, n_head, **options):
        raise RuntimeError("No available kernel")

    def right_when_few(qkv, n_head, **options):
        y = op.eager(qkv, n_head, **options)
        return y if qkv.shape[0] < 40 else y * 1.1

    for name, function in {"math": half, "flash": raises, "cudnn": right_when_few}.items():
        made = replace(op, implementations={**op.implementations, name: Implementation(function)})
        monkeypatch.setitem(attention_records.SPECS, "attention", made)
        there = bench("attention", replace(SMALL, batch_size=40))
        with pytest.raises(Failed, match="is off|does not run here"):
            there.check({"implementation": name})
    there = bench("attention", replace(SMALL, batch_size=40))
    with pytest.raises(Failed, match="is off at the full size"):
        there.check({"implementation": "cudnn"})


def test_dropout_is_in_what_is_timed():
    """Though what is compared has none: each implementation draws masks of its own."""
    sizes = replace(SMALL, dropout=0.5)
    (case,) = measure.timed_cases(spec("attention"), CPU, torch.float32, sizes)
    assert case.arguments["dropout_p"] == 0.5 and case.gradients
    linear = measure.timed_cases(spec("linear"), CPU, torch.bfloat16, sizes)
    assert len(linear) >= 4 and linear[0].inputs[0].dtype == torch.bfloat16
    assert linear[0].inputs[1].dtype == torch.float32  # a master


ONE = {
    "room": "fastgpt_kernels.ops.norm", "table": "FORWARD", "bound": 2048,
    "config": {"blocks": {"TILE": 32, "ROWS": 2, "STEPS": 2}, "num_warps": 4, "num_stages": 1},
}  # fmt: skip


def test_launch_configs_take_the_place_of_entries_and_give_it_back():
    before = dict(norm_configs.FORWARD)
    with using([ONE], "sm_90"):
        found = configs.lookup(norm_configs.FORWARD, "sm_90", 768)
        assert found == Config({"TILE": 32, "ROWS": 2, "STEPS": 2}, 4)
        assert configs.lookup(norm_configs.FORWARD, "sm_90", 4000).num_warps == 4
        assert configs.lookup(norm_configs.FORWARD, "sm_80", 768) != found
    assert dict(norm_configs.FORWARD) == before
    with pytest.raises(LookupError, match="no room os"):
        measure.table_of({"room": "os", "table": "environ"})
    assert Config(**found.to_dict()) == found


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run for real here")
def test_the_tables_that_ours_reads_are_found_and_a_candidate_runs(monkeypatch):
    """In the interpreter; candidates are those of the room's specs."""
    monkeypatch.setattr(host, "INTERPRETED", True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    there = bench("add_layer_norm", replace(SMALL, bias=False))
    found = there.tables()
    assert [(t["table"], t["bound"]) for t in found] == [("FORWARD", 2048), ("BACKWARD", 768)]
    assert all(t["candidates"] for t in found)
    there.check({"implementation": "triton", "configs": [ONE | {"bound": found[0]["bound"]}]})
    with pytest.raises(Failed):  # it is the candidate's config that is launched
        broken = {**ONE, "config": {**ONE["config"], "blocks": {}}}
        there.check({"implementation": "triton", "configs": [broken]})


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
def test_candidates_are_of_real_tables(arch):
    for module in measure.specs.spec_modules():
        for tunable in importlib.import_module(module).tunables(arch):
            table = getattr(measure.specs.configs_of(module), tunable.table)
            present = configs.lookup(table, arch, tunable.key)
            assert tunable.key in configs.entries(table, arch), f"{tunable.table} {tunable.key}"
            for config in tunable.candidates:
                assert config.blocks.keys() == present.blocks.keys(), f"{tunable.table}: {config}"


def test_candidates_come_from_the_record(monkeypatch):
    op = spec("attention")
    question = Question("attention", CPU, torch.float32, False, SMALL)
    assert names(op, question) == ["eager", "flash", "math"]
    monkeypatch.setattr(host, "arch", lambda i: "sm_90")
    gpu = replace(question, device=torch.device("cuda", 0), dtype=torch.bfloat16)
    assert names(op, gpu)[0] == "triton" and {"cudnn", "flash"} <= set(names(op, gpu))
    assert names(spec("mlp"), gpu) == ["eager", "triton"]  # a library's, until it was measured


class Fake:
    """Times ours by their launch configs: `best` of each table is the fastest."""

    parallel, asked = 1, 0

    def __init__(self, *_):
        type(self).asked += 1

    def check(self, candidate):
        if candidate.spec["implementation"] == "flash":
            raise Failed("wrong")

    def time(self, candidate):
        name = candidate.spec["implementation"]
        tuned = [c["config"]["num_warps"] for c in candidate.spec.get("configs", [])]
        ours = 10.0 - 2 * tuned.count(16) + tuned.count(2)
        return {"triton": ours, "cudnn": 9.0}.get(name, 30.0)

    def tables(self):
        def config(warps):
            return {"blocks": {"ROWS": 1}, "num_warps": warps, "num_stages": 1}

        where = {"room": "fastgpt_kernels.ops.attention", "bound": 64}
        tables = [{**where, "table": t} for t in ("FORWARD", "BACKWARD")]
        return [{**t, "candidates": [config(2), config(16)]} for t in tables]

    def close(self):
        pass


def test_ours_with_other_launch_configs_can_win(monkeypatch):
    """Where the default configs lose: 10 ms to cudnn's 9, then 8 and 6."""
    monkeypatch.setattr(host, "arch", lambda i: "sm_90")
    monkeypatch.setattr(tune.devices, "facts", lambda device: {"device": "fake"})
    question = Question(
        "attention", torch.device("cuda", 0), torch.bfloat16, True, Sizes(2, 64, 2, 128)
    )
    store = Store()
    plan = tune.measure(question, store, measurer=Fake, rounds=8)
    assert (plan.implementation, plan.configs) == ("cudnn", ())
    plan = tune.measure(question, store, measurer=Fake, rounds=8, with_configs=True)
    assert plan.implementation == "triton"
    assert [(c["table"], c["config"]["num_warps"]) for c in plan.configs] == [
        ("FORWARD", 16), ("BACKWARD", 16),
    ]  # fmt: skip
    assert "6 ms" in figures(plan.found) and plan.found.trials["flash"].problem == "wrong"
    again = tune.known(question, Store())
    assert again == plan
    asked = Fake.asked
    assert tune.measure(question, store, measurer=Fake, rounds=8) == plan
    assert Fake.asked == asked + 1


def test_tune_for_a_model_of_ones_own(monkeypatch):
    """What is asked is the call: shapes, types, the classes' range; then the store answers."""
    asked = []

    def measured(question, store, **_):
        asked.append(question)
        there = OpBench(**{**question.what, "device": "cpu"})
        for name in names(spec(question.op), question):
            there.check({"implementation": name})
        best = "math" if question.op == "attention" else "eager"
        found = Found("eager", best, {best: Trial(ms=1.0)}, True, "2026-01-01 00:00", 1.0)
        store.update(question.key(), lambda old: found.to_dict())
        return tune.OpPlan(best, (), found)

    monkeypatch.setattr(tune, "measure", measured)
    qkv = torch.randn(2, 8, 3 * 64, requires_grad=True)
    for op in ("attention", fastgpt_kernels.attention):
        tuned = fastgpt_kernels.tune(op, qkv, 2)
        assert tuned.plan.implementation == "math" and "measured 2026-01-01" in repr(tuned)
        torch.testing.assert_close(tuned(qkv, 2), fastgpt_kernels.attention(qkv, 2))
    assert len(asked) == 1
    fastgpt_kernels.tune("attention", qkv[:1], 2)
    assert len(asked) == 2
    x, w = torch.randn(6, 32, requires_grad=True), torch.randn(50, 32)
    fastgpt_kernels.tune("linear_cross_entropy", x, w, torch.randint(50, (6,)), vocab_size=50)
    assert asked[2].call["arguments"]["vocab_size"] == 50
    assert asked[2].call["arguments"]["targets"]["tensor"]["shape"] == [6]
    fastgpt_kernels.tune("mlp", x, torch.randn(64, 32), None, torch.randn(32, 64), None)
    assert asked[3].call["inputs"][2] is None


def test_what_cannot_be_tuned_is_said():
    with pytest.raises(ValueError, match="no op 'adamw' that can be measured: there are attention"):
        fastgpt_kernels.tune("adamw")
    with pytest.raises(ValueError, match="attention needs its tensors"):
        fastgpt_kernels.tune("attention", 3, 4)
    with pytest.raises(TypeError):
        fastgpt_kernels.tune("attention")


@pytest.mark.slow
def test_a_real_child_measures_attention_on_this_device():
    """All of it together, once: the default or a proven gain."""
    tuned = fastgpt_kernels.tune("attention", torch.randn(1, 8, 96, requires_grad=True), 2)
    assert tuned.plan.found.complete and set(tuned.plan.found.trials) == {"eager", "flash", "math"}
    assert all(not t.problem and t.ms > 0 for t in tuned.plan.found.trials.values())
    assert Candidate(tuned.plan.implementation).name in spec("attention").implementations
