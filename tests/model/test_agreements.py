"""What agreed once is not checked at the next start, unless anything that it rests on changed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastgpt import doctor
from fastgpt.config.presets import laptop
from fastgpt.model import agreements, contact, ops
from fastgpt.model.agreements import Agreements
from fastgpt.model.contact import Task, first_contact
from fastgpt.model.device import Machine
from fastgpt.model.plan import Plan
from fastgpt_kernels import host
from fastgpt_kernels.plans import device as devices
from fastgpt_kernels.registry import Sizes

GPU = torch.device("cuda")
GOOD = Task("bias_gelu", "triton", "cuda", "bfloat16", Sizes())
BAD = replace(GOOD, op="layer_norm")


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Start anew, and check tasks; gives what was found, and the ops that a process was asked."""
    facts = {"device": "NVIDIA H200", "driver": "580.1", "arch": "sm_90", "sources": "a"}
    monkeypatch.setattr(agreements, "_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(devices, "facts", lambda device: dict(facts))

    def start(*tasks, **changes):
        facts.update(changes)
        asked = []

        def ask(waiting, ahead, limits):
            asked.extend(task.op for task in waiting)
            return [(task, "is off" * (task.op == BAD.op)) for task in waiting]

        monkeypatch.setattr(contact, "_FOUND", {})
        monkeypatch.setattr(contact, "_ask", ask)
        return first_contact(tasks, before=Agreements(GPU)), asked

    return start


def test_what_agreed_is_not_asked_again(start):
    assert start(GOOD, BAD) == (["", "is off"], ["bias_gelu", "layer_norm"])
    assert start(GOOD, BAD) == (["", "is off"], ["layer_norm"]), "a failure was kept"
    assert start(replace(GOOD, device="cuda:3")) == ([""], []), "another GPU of the same kind"
    assert start(replace(GOOD, op="mlp")) == ([""], ["mlp"])
    assert start(GOOD, replace(GOOD, op="mlp")) == (["", ""], []), "the first was lost"


@pytest.mark.parametrize(
    "change",
    [
        {"implementation": "hopper"}, {"dtype": "float16"}, {"sizes": Sizes(dropout=0.1)},
        {"deterministic": True}, {"configs": "[1]"},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_another_task_is_asked(start, change):
    start(GOOD)
    assert start(replace(GOOD, **change)) == ([""], ["bias_gelu"])


@pytest.mark.parametrize("fact", ["device", "driver", "sources"])
def test_on_another_machine_all_are_asked(start, fact):
    start(GOOD)
    assert start(GOOD, **{fact: "another"}) == ([""], ["bias_gelu"])


def test_a_function_from_elsewhere_is_known_by_its_source(start, tmp_path, monkeypatch):
    module = tmp_path / "elsewhere.py"
    module.write_text("f = 1")
    monkeypatch.syspath_prepend(tmp_path)
    own = replace(GOOD, function="elsewhere:f")
    assert start(own)[1] == ["bias_gelu"]
    assert start(own)[1] == []
    module.write_text("f = 2")
    assert start(own)[1] == ["bias_gelu"]


@pytest.mark.parametrize("text", ["", "[]", '{"format": 1}', "cut"])
def test_a_broken_file_is_no_file(start, tmp_path, text):
    start(GOOD)
    (file,) = (tmp_path / "cache").glob("*.json")
    whole = file.read_text()
    assert '"agree"' in whole
    file.write_text(whole[:-20] if text == "cut" else text)
    assert start(GOOD) == ([""], ["bias_gelu"])
    file.write_text(whole.replace("[", '[7, "x", ').replace("]", ", null]"))
    assert start(GOOD) == ([""], []), "names beside what is no name"
    file.write_text(whole.replace("[", '{"a": [').replace("]", "]}"))
    assert start(GOOD) == ([""], ["bias_gelu"])


def test_a_folder_that_cannot_be_made(start, tmp_path):
    (tmp_path / "cache").write_text("a file")
    for _ in range(2):
        assert start(GOOD) == ([""], ["bias_gelu"])


def test_the_doctor_checks_anew(start, monkeypatch):
    start(GOOD)
    monkeypatch.setattr(agreements.host, "HAS_TRITON", True)
    monkeypatch.setattr(ops, "choose_all", lambda *asked: {})
    monkeypatch.setattr(doctor, "choose", lambda *asked: ops.OpTable({}, ()))
    machine = replace(Machine.of("cpu"), device=GPU)
    assert doctor._ops(laptop(), machine, 256, Plan()) == ()
    assert start(GOOD) == ([""], ["bias_gelu"])


def test_only_a_gpu_with_triton_keeps_any(start, monkeypatch):
    assert agreements.kept(torch.device("cpu")) is None
    monkeypatch.setattr(host, "HAS_TRITON", False)
    assert agreements.kept(GPU) is None
    monkeypatch.setattr(host, "HAS_TRITON", True)
    assert isinstance(agreements.kept(GPU), Agreements)


def test_the_folder_is_tritons(monkeypatch, tmp_path):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert agreements._folder() == tmp_path / "fastgpt"
