"""The search for launch configs: what it refuses, what it chooses, what it prints."""

import importlib

import pytest
import torch

from fastgpt_kernels import OPS, configs
from fastgpt_kernels.configs import Config
from fastgpt_kernels.host import arch_of
from fastgpt_kernels.record import Sizes, record
from fastgpt_kernels.specs import configs_of, spec_modules
from fastgpt_kernels.specs import tunable as make_tunable
from fastgpt_kernels.tools import tune
from fastgpt_kernels.tools.tune import Trial, choose, entry, report, search
from fastgpt_kernels.tools.workers import Worker
from tests.kernels import tune_samples


@pytest.mark.slow
def test_search_survives_every_fault_and_names_it() -> None:
    worker = Worker(tune._task, "cpu")
    try:
        trials = search(
            worker, tune_samples.__name__, "cpu", 0, tune_samples.CANDIDATES, rounds=5, timeout=3
        )
    finally:
        worker.close()
    by_fault = {tune_samples.FAULTS[t.config.blocks["FAULT"]]: t for t in trials}
    assert by_fault["none"].median < 5 < by_fault["slow"].median
    assert trials[0] is by_fault["none"]
    problems = {fault: t.problem for fault, t in by_fault.items()}
    assert problems["none"] == problems["slow"] == ""
    assert problems["wrong"].startswith("wrong: relative error ")
    assert problems["nan"] == "wrong: relative error nan in output 0"
    assert problems["raises"] == "ValueError: shared memory"
    assert problems["hangs"] == "took over 3 s"
    assert problems["dies"] == "killed its process (exit code 3)"
    (tunable,) = tune_samples.tunables("cpu")
    text = report(tunable, trials, tune_samples.CANDIDATES[0])
    assert text.count("(present)") == 1 and "took over 3 s" in text


A, B = Config({"ROWS": 1}, 4), Config({"ROWS": 2, "PER": 3}, 8, 2)


@pytest.mark.parametrize(
    ("trials", "wanted"),
    [
        ([Trial(B, 1.0), Trial(A, 1.005)], A),  # within the margin the present one stays
        ([Trial(B, 1.0), Trial(A, 1.5)], B),
        ([Trial(B, 1.0), Trial(A, problem="wrong")], B),
        ([Trial(A, problem="wrong")], None),
    ],
)
def test_choice(trials: list[Trial], wanted: Config | None) -> None:
    chosen = choose(trials, present=A)
    assert (chosen and chosen.config) == wanted


@pytest.mark.parametrize("config", [A, B])
def test_entry_can_be_pasted(config: Config) -> None:
    assert eval("{" + entry(64, config) + "}", {"Config": Config}) == {64: config}


def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
def test_tunables_name_real_tables_and_their_entries(arch: str) -> None:
    modules = spec_modules()
    assert modules
    for module in modules:
        for tunable in importlib.import_module(module).tunables(arch):
            table = getattr(configs_of(module), tunable.table)
            present = configs.lookup(table, arch, tunable.key)
            assert tunable.key in configs.entries(table, arch), f"{tunable.table} {tunable.key}"
            for config in tunable.candidates:
                assert config.blocks.keys() == present.blocks.keys(), f"{tunable.table}: {config}"


SMALL = Sizes(2, 32, 2, 64, 50, 64)


@pytest.mark.parametrize(
    ("op", "table", "key", "config", "options"),
    [
        ("attention", "FORWARD", 64, Config({"BLOCK_M": 16, "BLOCK_N": 32}, 4), {}),
        (
            "attention",
            "BACKWARD_DROPOUT",
            64,
            Config({"BLOCK_M": 16, "BLOCK_N": 32, "TMA_REDUCE": 0}, 4),
            {"backward": True, "dropout_p": 0.5, "seed": 3},
        ),
        ("add_layer_norm", "FORWARD", 2048, Config({"TILE": 32, "ROWS": 2, "STEPS": 2}, 4), {}),
        (
            "add_layer_norm",
            "BACKWARD",
            768,
            Config({"TILE": 32, "ROWS": 2, "PROGRAMS_PER_SM": 1}, 4),
            {"backward": True},
        ),
        ("cross_entropy", "CROSS_ENTROPY", 256, Config({"BLOCK": 32, "TILES": 2}, 4), {}),
    ],
)
def test_a_candidate_is_what_runs(op, table, key, config, options, device) -> None:
    """In place of the entry, while it runs, and with the reference's result."""
    arch = arch_of(torch.empty(0, device=device))
    made = make_tunable(
        record(op), arch, table, key, SMALL, [config], dtype=torch.float16, **options
    )  # fmt: skip
    tables = getattr(configs_of(f"{OPS[op].room}.specs"), table)
    before = dict(configs.entries(tables, arch))
    given = made.inputs(device)
    assert tune.check(made.run(given, config), made.reference(given)) == ""
    with pytest.raises(Exception, match="BLOCK|TILE|KeyError"):
        made.run(given, Config({}, 4))  # it does look at the config
    assert dict(configs.entries(tables, arch)) == before


@pytest.mark.cuda
@pytest.mark.slow
def test_present_entries_agree_with_the_reference(device: torch.device) -> None:
    """Every entry of this GPU's tables, at the size it is tuned at."""
    arch = arch_of(torch.empty(0, device=device))
    for module in spec_modules():
        for index, tunable in enumerate(importlib.import_module(module).tunables(arch)):
            present = configs.lookup(getattr(configs_of(module), tunable.table), arch, tunable.key)
            problem = tune._task(str(device), module, arch, index, [present])
            assert not problem, f"{tunable.table} {tunable.key}: {problem}"
            tune._problem.cache_clear()
